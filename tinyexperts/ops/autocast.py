"""The operators keep fp32 sums whatever the storage, so they run outside autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def outside_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast rounds nothing; entered only where it is on, since that takes a while."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
