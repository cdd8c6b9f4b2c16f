"""A table in int8, for inference: a token reads a quarter of the bytes of fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.cpu.huge_pages import prefer_huge_pages

# Elements that are quantized at a time: the copies in between stay small.
_CHUNK_ELEMENTS = 1 << 22
_LARGEST = 127


def quantize_vectors(experts_NED: Tensor) -> tuple[Tensor, Tensor]:
    """Round each vector to 255 levels between its largest magnitude and minus that, symmetric about zero.

    Args:
        experts_NED (float, [N, E, D]): a table, finite in fp32.

    Returns:
        table (int8, [N, E, D]) and scales (fp32, [N, E]): table * scales is within half a scale of each element.

    Raises:
        InputError: an element that is not finite.
    """
    table = prefer_huge_pages(torch.empty(experts_NED.shape, dtype=torch.int8, device=experts_NED.device))
    scales_NE = torch.empty(experts_NED.shape[:2], dtype=torch.float32, device=experts_NED.device)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, experts_NED[:1].numel()))
    with torch.no_grad():
        for start in range(0, len(experts_NED), chunk):
            rows = experts_NED[start : start + chunk].float()
            largest = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:2])
            check_finite(largest, rows)
            scales = largest / _LARGEST
            # A vector of zeros, or too small for a scale: whatever it is divided by, it becomes zero.
            quotients = rows / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
            table[start : start + chunk] = quotients.round().clamp(-_LARGEST, _LARGEST)
            scales_NE[start : start + chunk] = scales
    return table, scales_NE


def check_finite(largest: Tensor, numbers: Tensor) -> None:
    """Refuse numbers that are not finite, found by the largest of each part of them.

    Raises:
        InputError: one of the largest is not finite.
    """
    if not largest.isfinite().all():
        raise InputError(f"a table that is quantized must be finite, got {float(numbers[~numbers.isfinite()][0])}")
