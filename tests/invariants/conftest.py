"""A fixture for the tests of the kernels' threads."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def two_kernel_threads(monkeypatch):
    """Run kernels on two threads, torch's own operators on one: torch's OpenMP hangs in a child that was forked."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
