"""Adam on the touched rows of a table on the CPU; must match reference.py.

The limit is the memory: R rows of each table, scattered. So each is read and written once, in one pass, and during it
the rows that are touched next are prefetched, a few cache lines at a time: requested at once they would fill the queue
to the memory and hold up the arithmetic. Without prefetching a step takes 1.3 times as long (rows of 64 to 512 fp32).
The gradients are in order, and the processor prefetches them without being asked.

Tables are of fp32, fp64 or bf16; the moments and the arithmetic of bf16 are fp32.

Every touched row is updated by one thread: the bits don't depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.ops.cpu.compile import CACHE_LINE_BYTES, array_of, inlined, kernel, prefetch
from tinyexperts.ops.cpu.threads import parallel_for
from tinyexperts.ops.indices import check_indices
from tinyexperts.ops.row_adam import portable
from tinyexperts.ops.row_adam.rounding_cpu import key_of, narrowed, widened

# Tables that there are kernels for.
TABLE_TYPES = (torch.float32, torch.float64, torch.bfloat16)
# Touched rows between the one that is updated and the one that is prefetched.
_AHEAD = 4
# Elements between two rounds of prefetching.
_CHUNK = 64
# Elements of touched rows that are worth a part of their own.
_MIN_ELEMENTS = 1 << 15


def row_adam_(
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    rounding_seed: int | None = None,
) -> None:
    """Update experts, exp_avg and exp_avg_sq in place at `rows`; arguments as in tinyexperts.ops.row_adam_."""
    tables = (experts, exp_avg, exp_avg_sq)
    # The type of the moments and of the arithmetic.
    dtype = torch.promote_types(experts.dtype, torch.float32)
    have_kernels = experts.dtype in TABLE_TYPES and exp_avg.dtype == exp_avg_sq.dtype == dtype
    # Of a table that is not contiguous a kernel would update a copy.
    if not have_kernels or not all(table.is_contiguous() for table in tables):
        operands = *tables, rows, grad_rows
        portable.row_adam_(*operands, learning_rate, beta1, beta2, eps, weight_decay, step, rounding_seed)
        return
    if grad_rows.numel() == 0:
        return
    check_indices("rows", rows, len(experts))
    one_a_vector = exp_avg_sq.dim() < experts.dim()
    # A row is V vectors of D elements, or W elements. A view: should it ever need a copy, it raises.
    shape = (exp_avg_sq[0].numel(), experts.shape[-1]) if one_a_vector else (experts[0].numel(),)
    values, first_moments = (array_of(table.view(-1, *shape)) for table in (experts, exp_avg))
    parallel_for(
        _step_of_vectors if one_a_vector else _step_of_elements,
        len(rows),
        values,
        first_moments,
        array_of(exp_avg_sq.view(-1, shape[0])),
        array_of(rows),
        array_of(grad_rows.to(dtype).reshape(-1, *shape)),
        constants(first_moments.dtype, learning_rate, beta1, beta2, eps, weight_decay, step),
        key_of(rounding_seed),
        min_items=max(1, _MIN_ELEMENTS // math.prod(shape)),
    )


def constants(
    dtype: Any, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> tuple[Any, ...]:
    """Return the factors of a step in the numpy type of the computation: Python's numbers would widen fp32 to fp64."""
    rate = portable.bias_corrected_rate(learning_rate, beta1, beta2, step)
    return tuple(np.array([1 - beta1, 1 - beta2, rate, eps, 1 - learning_rate * weight_decay], dtype=dtype))


@kernel
def _step_of_elements(
    experts: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    rows: Any,
    grad_rows: Any,
    constants: Any,
    key: Any,
    start: int,
    stop: int,
) -> None:
    # Beyond the part's end its last row is prefetched: the next part may be another thread's.
    for r in range(start, stop):
        ahead = rows[min(r + _AHEAD, stop - 1)]
        update_elements(experts, exp_avg, exp_avg_sq, rows[r], ahead, grad_rows, r, constants, key)


@kernel
def _step_of_vectors(
    experts: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    rows: Any,
    grad_rows: Any,
    constants: Any,
    key: Any,
    start: int,
    stop: int,
) -> None:
    # Beyond the part's end its last row is prefetched: the next part may be another thread's.
    for r in range(start, stop):
        ahead = rows[min(r + _AHEAD, stop - 1)]
        update_vectors(experts, exp_avg, exp_avg_sq, rows[r], ahead, grad_rows, r, constants, key)


@inlined
def _prefetch_elements(table: Any, first: int, count: int) -> None:
    """Ask for the cache lines of elements of a table."""
    start = table.ctypes.data + first * table.itemsize
    for address in range(start, start + count * table.itemsize, CACHE_LINE_BYTES):
        prefetch(address)


@inlined
def update_elements(
    experts: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    row: int,
    row_ahead: int,
    grad_rows: Any,
    r: int,
    constants: Any,
    key: Any,
) -> None:
    """Update one row of tables [N, W] by gradient r of [R, W]; `key` is that of `narrowed`."""
    gain1, gain2, rate, eps, keep = constants
    width = experts.shape[1]
    for chunk in range(0, width, _CHUNK):
        end = min(chunk + _CHUNK, width)
        # The same elements of a row to come, of all three tables.
        ahead = row_ahead * width + chunk
        _prefetch_elements(experts, ahead, end - chunk)
        _prefetch_elements(exp_avg, ahead, end - chunk)
        _prefetch_elements(exp_avg_sq, ahead, end - chunk)
        # As slices: indexed by row and element, the loop does not vectorize.
        value, first, second = experts[row, chunk:end], exp_avg[row, chunk:end], exp_avg_sq[row, chunk:end]
        grad = grad_rows[r, chunk:end]
        start = row * width + chunk
        # The bias corrections and the learning rate are one number, `rate`, and weight decay is `keep`.
        for d in range(end - chunk):
            first[d] += gain1 * (grad[d] - first[d])
            second[d] += gain2 * (grad[d] * grad[d] - second[d])
            new = keep * widened(value[d]) - rate * (first[d] / (math.sqrt(second[d]) + eps))
            value[d] = narrowed(experts, new, start, d, key)


@inlined
def update_vectors(
    experts: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    row: int,
    row_ahead: int,
    grad_rows: Any,
    r: int,
    constants: Any,
    key: Any,
) -> None:
    """Update one row of experts and exp_avg [N, V, D] and exp_avg_sq [N, V] by gradient r of [R, V, D]."""
    gain1, gain2, rate, eps, keep = constants
    num_vectors, dim = experts.shape[1:]
    for vector in range(num_vectors):
        vector_ahead = row_ahead * num_vectors + vector
        prefetch(exp_avg_sq.ctypes.data + vector_ahead * exp_avg_sq.itemsize)
        # First the vector's second moment, from the mean of all its squares, which are in the cache afterwards.
        squares = exp_avg.dtype.type(0)
        for d in range(dim):
            squares += grad_rows[r, vector, d] * grad_rows[r, vector, d]
        second = exp_avg_sq[row, vector]
        second += gain2 * (squares / exp_avg.dtype.type(dim) - second)
        exp_avg_sq[row, vector] = second
        # One division for the whole vector.
        scale = rate / (math.sqrt(second) + eps)
        # Then its values and first moments, with those of a row to come prefetched in between.
        for chunk in range(0, dim, _CHUNK):
            end = min(chunk + _CHUNK, dim)
            ahead = vector_ahead * dim + chunk
            _prefetch_elements(experts, ahead, end - chunk)
            _prefetch_elements(exp_avg, ahead, end - chunk)
            value, first = experts[row, vector, chunk:end], exp_avg[row, vector, chunk:end]
            grad = grad_rows[r, vector, chunk:end]
            start = (row * num_vectors + vector) * dim + chunk
            for d in range(end - chunk):
                first[d] += gain1 * (grad[d] - first[d])
                new = keep * widened(value[d]) - scale * first[d]
                value[d] = narrowed(experts, new, start, d, key)
