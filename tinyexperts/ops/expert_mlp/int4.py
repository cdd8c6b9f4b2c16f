"""A table in 4 bits, for inference: a token reads a seventh of the bytes of fp32.

An element is (code - 8) * scale, with a code of 0..15 and one scale for each group of 32 elements of a vector (at the
end of fewer). Two codes make a byte: the first half of a group are the low four bits, the second half the high ones, so
that a SIMD unit takes 16 bytes to 32 numbers without moving any. A group of n elements has ceil(n / 2) bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tinyexperts.ops.cpu.huge_pages import prefer_huge_pages
from tinyexperts.ops.expert_mlp.int8 import check_finite

GROUP = 32
"""Elements that share a scale."""

# Elements that are quantized at a time: the copies in between stay small.
_CHUNK_ELEMENTS = 1 << 21
_LOWEST, _HIGHEST = -8, 7
# The level that the largest element of a group may become. There is no level +8, so the scale's sign is that which
# makes the largest negative. Of these the one with the least squared error is taken: on Gaussian and on trained tables
# the root of the mean square falls from 0.097 and 0.090 (levels -7 to 7) to 0.083 and 0.077 of theirs.
_LARGEST_LEVELS = (-8.0, -7.0, -7.5, -8.5)


def num_groups(dim: int) -> int:
    """Return the number of groups of a vector of D elements."""
    return -(-dim // GROUP)


def packed_bytes(dim: int) -> int:
    """Return the number of bytes of a vector of D elements."""
    return -(-dim // 2)


def quantize_groups(experts_NED: Tensor) -> tuple[Tensor, Tensor]:
    """Round each group of 32 elements of a vector to 16 levels, of the scale that has the least squared error.

    Args:
        experts_NED (float, [N, E, D]): a table, finite in fp32.

    Returns:
        table (uint8, [N, E, ceil(D / 2)]): the codes, two in a byte.
        scales (bf16, [N, E, ceil(D / 32)]): the difference of two levels of a group, of either sign.

    Raises:
        InputError: an element that is not finite.
    """
    num_experts, num_vectors, dim = experts_NED.shape
    device = experts_NED.device
    table = prefer_huge_pages(
        torch.empty(num_experts, num_vectors, packed_bytes(dim), dtype=torch.uint8, device=device)
    )
    scales_NEG = prefer_huge_pages(
        torch.empty(num_experts, num_vectors, num_groups(dim), dtype=torch.bfloat16, device=device)
    )
    chunk = max(1, _CHUNK_ELEMENTS // max(1, num_vectors * dim))
    with torch.no_grad():
        for start in range(0, num_experts, chunk):
            rows = slice(start, start + chunk)
            numbers = experts_NED[rows].float()
            for span in _spans(dim):
                codes, scales = _quantize(_split(numbers[..., span.elements], span.size))
                half = packed_bytes(span.size)
                packed = codes[..., :half].contiguous()
                packed[..., : span.size - half] |= codes[..., half:] << 4
                table[rows, :, span.bytes], scales_NEG[rows, :, span.groups] = packed.flatten(-2), scales
    return table, scales_NEG


def unpack_groups(table: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Write the numbers of vectors.

    Args:
        table (uint8, [R, ceil(D / 2)]): the codes of R vectors.
        scales (float, [R, ceil(D / 32)]): their scales.
        out (float, [R, D]): the place for the numbers.

    Returns:
        out.
    """
    for span in _spans(out.shape[1]):
        half = packed_bytes(span.size)
        codes = _split(table[:, span.bytes], half)
        numbers = _split(out[:, span.elements], span.size)
        numbers[..., :half] = codes & 15
        numbers[..., half:] = (codes >> 4)[..., : span.size - half]
        numbers += _LOWEST
        numbers *= scales[:, span.groups].to(out.dtype).unsqueeze(-1)
    return out


class _Span(NamedTuple):
    """Groups of equal size that follow each other in a vector, with the places of their elements, codes and scales."""

    size: int
    elements: slice
    bytes: slice
    groups: slice


def _spans(dim: int) -> list[_Span]:
    """Return the whole groups of a vector, and the shorter one at its end; only those that there are."""
    whole = dim // GROUP * GROUP
    return [
        _Span(
            size=min(GROUP, stop - start),
            elements=slice(start, stop),
            bytes=slice(packed_bytes(start), packed_bytes(stop)),
            groups=slice(num_groups(start), num_groups(stop)),
        )
        for start, stop in ((0, whole), (whole, dim))
        if start < stop
    ]


def _split(tensor: Tensor, size: int) -> Tensor:
    """Return a view whose last dimension is in parts of `size`."""
    parts: Tensor = tensor.unflatten(-1, (-1, size))  # type: ignore[no-untyped-call]
    return parts


def _quantize(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (uint8, [..., G, n]) and the scales (bf16, [..., G]) of groups (fp32, [..., G, n])."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    check_finite(largest, groups)
    # For a group of zeros, whose error is NaN and never less.
    best_scales, best_levels, least = largest, groups, torch.full_like(largest, torch.inf)
    for level in _LARGEST_LEVELS:
        # The levels are chosen for the scale as it is stored.
        scales = (largest / level).bfloat16().float()
        levels = (groups / torch.where(scales == 0, 1.0, scales)).round_().clamp_(_LOWEST, _HIGHEST)
        # In parts of the largest, whose square may be no number.
        error = (levels * scales).sub_(groups).div_(largest).square_().sum(-1, keepdim=True)
        is_better = error < least
        best_scales, least = torch.where(is_better, scales, best_scales), torch.where(is_better, error, least)
        best_levels = torch.where(is_better, levels, best_levels)
    return (best_levels - _LOWEST).to(torch.uint8), best_scales.squeeze(-1).bfloat16()
