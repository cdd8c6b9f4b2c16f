"""The operators keep fp32 sums whatever the storage: PyTorch's dispatcher switches autocast off for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS", "xpu": "AutocastXPU"}


def outside_autocast(operator: CustomOpDef) -> CustomOpDef:
    """Make autocast round nothing in an operator, whichever kernel runs; without autocast this costs nothing."""

    def call_outside(device_type: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with torch.autocast(device_type, enabled=False):
                return operator(*arguments)

        return call

    for device_type, key in _KEYS.items():
        torch.library.impl(operator._qualname, key, call_outside(device_type))
    return operator
