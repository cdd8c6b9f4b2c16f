"""The two things that the CPU kernels do with vectors of a table: multiply with a token's, and add to a token's.

The limit is the memory: the rows of a token lie anywhere in the table. So each vector is read once, those of four
experts side by side, and meanwhile the same vectors of the experts further on (in the next token, too) are prefetched,
a few cache lines at a time. Asked for at once they would fill the queue to the memory and hold up the arithmetic; asked
for in one of the two passes only, the memory would rest in the other (1.6 and 1.2 times the time at D = 256).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyexperts.ops.numba_kernel import CACHE_LINE_BYTES, bytes_of_element, inlined, prefetch, widen

# Elements between two rounds of prefetching.
_CHUNK = 64
# How far ahead to prefetch: far enough to cover the memory's latency, and little enough for a core's second cache.
_AHEAD_BYTES = 1 << 14
_LEAST_AHEAD = 8


@inlined
def _rows_ahead(experts: Any) -> Any:
    row_bytes = max(1, experts.shape[1] * experts.shape[2] * bytes_of_element(experts))
    return max(_LEAST_AHEAD, _AHEAD_BYTES // row_bytes)


@inlined
def _address(experts: Any, ids: Any, pair: int, vector: int) -> Any:
    """Of a pair's vector; of the last pair's beyond the end."""
    row = ids[min(pair, len(ids) - 1)] * experts.shape[1] + vector
    return np.uintp(experts.ctypes.data + row * experts.shape[2] * bytes_of_element(experts))


@inlined
def products_of_4(experts: Any, ids: Any, pair: int, vector: int, x: Any, m: int, zero: Any) -> Any:
    """experts[id, vector] . x[m] for the four pairs from `pair` on; ids [M*P]."""
    i0, i1, i2, i3 = ids[pair], ids[pair + 1], ids[pair + 2], ids[pair + 3]
    later = pair + _rows_ahead(experts)
    ahead0, ahead1 = _address(experts, ids, later, vector), _address(experts, ids, later + 1, vector)
    ahead2, ahead3 = _address(experts, ids, later + 2, vector), _address(experts, ids, later + 3, vector)
    # Unsigned, since numba lets signed indices count from the end, and then not everything vectorises.
    dim, chunk, itemsize = np.uintp(x.shape[1]), np.uintp(_CHUNK), np.uintp(bytes_of_element(experts))
    whole = dim // chunk * chunk
    sum0 = sum1 = sum2 = sum3 = zero
    for first in range(np.uintp(0), whole, chunk):
        for offset in range(first * itemsize, (first + chunk) * itemsize, np.uintp(CACHE_LINE_BYTES)):
            prefetch(ahead0 + offset)
            prefetch(ahead1 + offset)
            prefetch(ahead2 + offset)
            prefetch(ahead3 + offset)
        for d in range(first, first + chunk):
            sum0 += widen(experts[i0, vector, d]) * x[m, d]
            sum1 += widen(experts[i1, vector, d]) * x[m, d]
            sum2 += widen(experts[i2, vector, d]) * x[m, d]
            sum3 += widen(experts[i3, vector, d]) * x[m, d]
    for offset in range(whole * itemsize, dim * itemsize, np.uintp(CACHE_LINE_BYTES)):
        prefetch(ahead0 + offset)
        prefetch(ahead1 + offset)
        prefetch(ahead2 + offset)
        prefetch(ahead3 + offset)
    for d in range(whole, dim):
        sum0 += widen(experts[i0, vector, d]) * x[m, d]
        sum1 += widen(experts[i1, vector, d]) * x[m, d]
        sum2 += widen(experts[i2, vector, d]) * x[m, d]
        sum3 += widen(experts[i3, vector, d]) * x[m, d]
    return sum0, sum1, sum2, sum3


@inlined
def add_4(
    experts: Any,
    ids: Any,
    pair: int,
    vector: int,
    factor0: Any,
    factor1: Any,
    factor2: Any,
    factor3: Any,
    y: Any,
    m: int,
) -> None:
    """y[m] += the sum of factor * experts[id, vector] over the four pairs from `pair` on."""
    i0, i1, i2, i3 = ids[pair], ids[pair + 1], ids[pair + 2], ids[pair + 3]
    later = pair + _rows_ahead(experts)
    ahead0, ahead1 = _address(experts, ids, later, vector), _address(experts, ids, later + 1, vector)
    ahead2, ahead3 = _address(experts, ids, later + 2, vector), _address(experts, ids, later + 3, vector)
    dim, chunk, itemsize = np.uintp(y.shape[1]), np.uintp(_CHUNK), np.uintp(bytes_of_element(experts))
    whole = dim // chunk * chunk
    for first in range(np.uintp(0), whole, chunk):
        for offset in range(first * itemsize, (first + chunk) * itemsize, np.uintp(CACHE_LINE_BYTES)):
            prefetch(ahead0 + offset)
            prefetch(ahead1 + offset)
            prefetch(ahead2 + offset)
            prefetch(ahead3 + offset)
        for d in range(first, first + chunk):
            y[m, d] += (factor0 * widen(experts[i0, vector, d]) + factor1 * widen(experts[i1, vector, d])) + (
                factor2 * widen(experts[i2, vector, d]) + factor3 * widen(experts[i3, vector, d])
            )
    for offset in range(whole * itemsize, dim * itemsize, np.uintp(CACHE_LINE_BYTES)):
        prefetch(ahead0 + offset)
        prefetch(ahead1 + offset)
        prefetch(ahead2 + offset)
        prefetch(ahead3 + offset)
    for d in range(whole, dim):
        y[m, d] += (factor0 * widen(experts[i0, vector, d]) + factor1 * widen(experts[i1, vector, d])) + (
            factor2 * widen(experts[i2, vector, d]) + factor3 * widen(experts[i3, vector, d])
        )


@inlined
def _prefetch_ahead(experts: Any, ids: Any, pair: int, vector: int) -> None:
    ahead = _address(experts, ids, pair + _rows_ahead(experts), vector)
    for offset in range(
        np.uintp(0), np.uintp(experts.shape[2] * bytes_of_element(experts)), np.uintp(CACHE_LINE_BYTES)
    ):
        prefetch(ahead + offset)


@inlined
def product(experts: Any, ids: Any, pair: int, vector: int, x: Any, m: int, zero: Any) -> Any:
    """experts[id, vector] . x[m] for one pair."""
    _prefetch_ahead(experts, ids, pair, vector)
    i, total = ids[pair], zero
    for d in range(np.uintp(x.shape[1])):
        total += widen(experts[i, vector, d]) * x[m, d]
    return total


@inlined
def add_1(experts: Any, ids: Any, pair: int, vector: int, factor: Any, y: Any, m: int) -> None:
    """y[m] += factor * experts[id, vector] for one pair."""
    _prefetch_ahead(experts, ids, pair, vector)
    i = ids[pair]
    for d in range(np.uintp(y.shape[1])):
        y[m, d] += factor * widen(experts[i, vector, d])


@inlined
def prefetch_scales_of_4(scales: Any, experts: Any, ids: Any, pair: int) -> None:
    """The scales [N, E] (or none) of the experts whose vectors are prefetched at `pair`."""
    if len(scales) > 0:
        row_bytes = scales.shape[1] * bytes_of_element(scales)
        for later in range(pair + _rows_ahead(experts), pair + _rows_ahead(experts) + 4):
            prefetch(scales.ctypes.data + ids[min(later, len(ids) - 1)] * row_bytes)
