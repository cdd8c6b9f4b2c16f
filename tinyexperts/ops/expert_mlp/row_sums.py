"""The gradients of the rows that a batch touched, from the factors that the backward pass writes (cpu.py).

Each row is summed by one thread in the order of its tokens: the bits don't depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyexperts.ops.cpu import huge_pages
from tinyexperts.ops.cpu.compile import array_of, inlined, kernel
from tinyexperts.ops.cpu.threads import parallel_for

# Elements of rows that are worth a part of their own.
_MIN_ELEMENTS = 1 << 16


def find_touched_rows(ids_MP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the touched rows [R], ascending, the pairs sorted stably by row [M*P], and the first pair of each row.

    One start more is the end of the last row's pairs.
    """
    sorted_ids, order = ids_MP.flatten().sort(stable=True)
    rows, starts = torch.empty_like(order), order.new_empty(len(order) + 1)
    num_rows = _find_starts(array_of(sorted_ids), array_of(rows), array_of(starts))
    return rows[:num_rows].clone(), order, starts[: num_rows + 1]


def sparse_gradient(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Return the sparse_coo gradient of rows [R] that ascend and don't repeat."""
    # torch loses the flag on the way into .grad. The device by name: torch would take its default one otherwise.
    return torch.sparse_coo_tensor(
        rows[None], values, shape, device=values.device, is_coalesced=True, check_invariants=False
    )


def sum_gradient_rows(order: Tensor, starts: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor) -> Tensor:
    """Return the gradients of the touched rows [R, E, D], in the factors' type."""
    num_vectors, _, num_retrieved = factors_EMP.shape
    dtype = factors_EMP.dtype
    grad_rows = huge_pages.empty(len(starts) - 1, num_vectors, x_MD.shape[1], dtype=dtype)
    parallel_for(
        _sum_gradient_rows,
        len(grad_rows),
        array_of(order),
        array_of(starts),
        array_of(factors_EMP.flatten(1)),
        array_of(x_MD.to(dtype)),
        array_of(grad_y_MD.to(dtype)),
        num_retrieved,
        array_of(grad_rows),
        min_items=max(1, _MIN_ELEMENTS // (num_vectors * x_MD.shape[1])),
    )
    return grad_rows


@kernel
def _find_starts(sorted_ids: Any, rows: Any, starts: Any) -> int:
    """Write the rows and where their pairs start; return how many rows there are."""
    num_rows = 0
    for pair in range(len(sorted_ids)):
        if pair == 0 or sorted_ids[pair] != sorted_ids[pair - 1]:
            rows[num_rows], starts[num_rows] = sorted_ids[pair], pair
            num_rows += 1
    starts[num_rows] = len(sorted_ids)
    return num_rows


@inlined
def sum_gradient_row(
    order: Any, starts: Any, factors: Any, x: Any, grad_y: Any, num_retrieved: int, r: int, out: Any, out_row: int
) -> None:
    """Write the gradient of row r to out[out_row]: for each vector the sum over the row's pairs of factor * token.

    The tokens are those of grad_y for the last vector (v) and of x for the others, in their order.
    """
    num_vectors, dim = out.shape[1:]
    for vector in range(num_vectors):
        operand = grad_y if vector == num_vectors - 1 else x
        for position in range(starts[r], starts[r + 1]):
            pair = order[position]
            factor, token = factors[vector, pair], pair // num_retrieved
            if position == starts[r]:
                for d in range(dim):
                    out[out_row, vector, d] = factor * operand[token, d]
            else:
                for d in range(dim):
                    out[out_row, vector, d] += factor * operand[token, d]


@kernel
def _sum_gradient_rows(
    order: Any,
    starts: Any,
    factors: Any,
    x: Any,
    grad_y: Any,
    num_retrieved: int,
    grad_rows: Any,
    start: int,
    stop: int,
) -> None:
    for r in range(start, stop):
        sum_gradient_row(order, starts, factors, x, grad_y, num_retrieved, r, grad_rows, r)
