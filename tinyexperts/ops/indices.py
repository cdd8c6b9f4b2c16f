"""A check of the indices that a kernel reads or writes memory at."""

from __future__ import annotations

from torch import Tensor

from tinyexperts.errors import InputError


def check_indices(name: str, indices: Tensor, num_experts: int) -> None:
    """Raise InputError where an index is outside 0..N - 1.

    Only on the CPU: on an accelerator reading the extremes would wait for it, and indexing asserts there anyway.
    """
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(extreme) for extreme in indices.aminmax())
        if low < 0 or high >= num_experts:
            raise InputError(f"{name} must be between 0 and N - 1 = {num_experts - 1}, got {low if low < 0 else high}")
