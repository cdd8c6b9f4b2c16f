"""A table in int8, for inference: a token reads a quarter of the bytes of fp32."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that are quantized at a time: the copies in between stay small.
_CHUNK_ELEMENTS = 1 << 22
_LARGEST = 127


def quantize_vectors(experts_NED: Tensor) -> tuple[Tensor, Tensor]:
    """Round each vector to 255 levels between its largest magnitude and minus that, symmetric about zero.

    Args:
        experts_NED (float, [N, E, D]): a table, finite.

    Returns:
        table (int8, [N, E, D]) and scales (fp32, [N, E]): table * scales is within half a scale of each element.
    """
    table = torch.empty(experts_NED.shape, dtype=torch.int8, device=experts_NED.device)
    scales_NE = torch.empty(experts_NED.shape[:2], dtype=torch.float32, device=experts_NED.device)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, experts_NED[:1].numel()))
    with torch.no_grad():
        for start in range(0, len(experts_NED), chunk):
            rows = experts_NED[start : start + chunk].float()
            largest = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:2])
            scales = largest / _LARGEST
            # A vector of zeros, or too small for a scale: whatever it is divided by, it becomes zero.
            quotients = rows / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
            table[start : start + chunk] = quotients.round().clamp(-_LARGEST, _LARGEST)
            scales_NE[start : start + chunk] = scales
    return table, scales_NE
