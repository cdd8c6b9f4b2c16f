"""Adam on the touched rows of a bf16 table on the CPU; must match reference.py, and rounding.py to the bit.

A step reads and writes 2 bytes of a value where fp32 has 4. A few elements at a time are widened into a buffer that
stays in the cache, updated there in fp32, and rounded back: to the nearest number, or by chance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyexperts.ops.cpu.compile import CACHE_LINE_BYTES, inlined, prefetch

# Elements that are widened at a time, and between two rounds of prefetching.
CHUNK = 64


@inlined
def update_bf16_elements(
    experts: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    row: int,
    row_ahead: int,
    grad_rows: Any,
    r: int,
    constants: Any,
    seed: int,
    buffer: Any,
) -> None:
    """Update one row of tables [N, W], experts in the bits of bf16, by gradient r of [R, W]; seed < 0: to the nearest.

    `buffer` (fp32, [CHUNK]) is memory for the work.
    """
    gain1, gain2, rate, eps, keep = constants
    width = experts.shape[1]
    for chunk in range(0, width, CHUNK):
        end = min(chunk + CHUNK, width)
        _prefetch(experts, row_ahead * width + chunk, end - chunk)
        _prefetch(exp_avg, row_ahead * width + chunk, end - chunk)
        _prefetch(exp_avg_sq, row_ahead * width + chunk, end - chunk)
        stored, value = experts[row, chunk:end], buffer[: end - chunk]
        first, second, grad = exp_avg[row, chunk:end], exp_avg_sq[row, chunk:end], grad_rows[r, chunk:end]
        _widen(stored, value)
        for d in range(end - chunk):
            first[d] += gain1 * (grad[d] - first[d])
            second[d] += gain2 * (grad[d] * grad[d] - second[d])
            value[d] = keep * value[d] - rate * (first[d] / (math.sqrt(second[d]) + eps))
        _round(value, stored, row * width + chunk, seed)


@inlined
def update_bf16_vectors(
    experts: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    row: int,
    row_ahead: int,
    grad_rows: Any,
    r: int,
    constants: Any,
    seed: int,
    buffer: Any,
) -> None:
    """Update one row of experts (in the bits of bf16) and exp_avg [N, V, D] and exp_avg_sq [N, V], as above."""
    gain1, gain2, rate, eps, keep = constants
    num_vectors, dim = experts.shape[1:]
    for vector in range(num_vectors):
        first_place, vector_ahead = (row * num_vectors + vector) * dim, row_ahead * num_vectors + vector
        _prefetch(exp_avg_sq, vector_ahead, 1)
        squares = exp_avg.dtype.type(0)
        for d in range(dim):
            squares += grad_rows[r, vector, d] * grad_rows[r, vector, d]
        second = exp_avg_sq[row, vector]
        second += gain2 * (squares / exp_avg.dtype.type(dim) - second)
        exp_avg_sq[row, vector] = second
        scale = rate / (math.sqrt(second) + eps)
        for chunk in range(0, dim, CHUNK):
            end = min(chunk + CHUNK, dim)
            _prefetch(experts, vector_ahead * dim + chunk, end - chunk)
            _prefetch(exp_avg, vector_ahead * dim + chunk, end - chunk)
            stored, value = experts[row, vector, chunk:end], buffer[: end - chunk]
            first, grad = exp_avg[row, vector, chunk:end], grad_rows[r, vector, chunk:end]
            _widen(stored, value)
            for d in range(end - chunk):
                first[d] += gain1 * (grad[d] - first[d])
                value[d] = keep * value[d] - scale * first[d]
            _round(value, stored, first_place + chunk, seed)


@inlined
def _prefetch(table: Any, first: int, count: int) -> None:
    start = table.ctypes.data + first * table.itemsize
    for offset in range(0, count * table.itemsize, CACHE_LINE_BYTES):
        prefetch(start + offset)


# Every intermediate result is cast back to 32 bits, as numba would go on in 64; then the loops are vectorized.
_U32 = np.uint32


@inlined
def _widen(stored: Any, value: Any) -> None:
    bits = value.view(np.uint32)
    for d in range(len(stored)):
        bits[d] = _U32(_U32(stored[d]) << _U32(16))


@inlined
def _round(value: Any, stored: Any, first_place: int, seed: int) -> None:
    """Write fp32 numbers as bf16, as torch rounds them to the nearest, or as rounding.py does by chance."""
    if seed < 0:
        _round_to_nearest(value, stored)
        return
    # Places that differ in their lower 32 bits alone; a second part, behind a multiple of 2^32, is mostly empty.
    first_part = min(len(stored), (1 << 32) - (first_place & 0xFFFFFFFF))
    _round_by_chance(value[:first_part], stored[:first_part], first_place, seed)
    _round_by_chance(value[first_part:], stored[first_part:], first_place + first_part, seed)


@inlined
def _round_to_nearest(value: Any, stored: Any) -> None:
    bits = value.view(np.uint32)
    for d in range(len(stored)):
        number = bits[d]
        # Half of what is cut off, and ties to the even number.
        rounded = _U32(number + _U32(0x7FFF) + ((number >> _U32(16)) & _U32(1)))
        is_nan = _U32(number & _U32(0x7FFFFFFF)) > _U32(0x7F800000)
        stored[d] = np.uint16(_U32(0x7FC0) if is_nan else _U32(rounded >> _U32(16)))


@inlined
def _round_by_chance(value: Any, stored: Any, first_place: int, seed: int) -> None:
    bits, exponent = value.view(np.uint32), _U32(0x7F800000)
    low = _U32(first_place & 0xFFFFFFFF)
    mixed = _U32(_U32(_U32(first_place >> 32) * _U32(0x9E3779B1)) ^ _U32(seed))
    for d in range(len(stored)):
        chance = _U32(_U32(low + _U32(d)) ^ mixed)
        chance = _U32(chance ^ _U32(chance >> _U32(16)))
        chance = _U32(chance * _U32(0x7FEB352D))
        chance = _U32(chance ^ _U32(chance >> _U32(15)))
        chance = _U32(chance * _U32(0x846CA68B))
        chance = _U32(chance ^ _U32(chance >> _U32(16)))
        number = bits[d]
        rounded = _U32(number + _U32(chance >> _U32(16)))
        stays_finite = ((number & exponent) != exponent) & ((rounded & exponent) != exponent)
        top = _U32(_U32(rounded if stays_finite else number) >> _U32(16))
        is_nan = _U32(number & _U32(0x7FFFFFFF)) > exponent
        stored[d] = np.uint16(_U32(top | _U32(0x40)) if is_nan else top)
