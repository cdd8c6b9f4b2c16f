"""What the operands of Triton's kernels of experts must be; everything else runs plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.ops.gpu.dispatch import BeyondLimits
from tinyexperts.ops.gpu.launch import MAX_DIM

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The floating-point types."""
MAX_PAIRS = 1 << 30
"""The pairs of a token and an expert that the kernels count in 32 bits."""


def check_limits(dim: int, num_pairs: int, *operands: Tensor) -> None:
    """Check what all kernels of experts ask for.

    Raises:
        BeyondLimits: D outside of 1..MAX_DIM, too many pairs, or an operand of another type than fp32, bf16 or fp16.
    """
    if not 1 <= dim <= MAX_DIM:
        raise BeyondLimits(f"D must be between 1 and {MAX_DIM}, got {dim}")
    if num_pairs >= MAX_PAIRS:
        raise BeyondLimits(f"pairs of a token and an expert must be fewer than {MAX_PAIRS}, got {num_pairs}")
    for operand in operands:
        if operand.dtype not in FLOATS:
            raise BeyondLimits(f"operands must be fp32, bf16 or fp16, got {operand.dtype}")
