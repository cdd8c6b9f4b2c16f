"""Adam on the touched rows straight from a gradient in deferred form; must match row_adam_ to the bit.

Each row's gradient is summed into a buffer that stays in the cache and used there; it is never written to memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tinyexperts.ops.cpu.compile import array_of, kernel
from tinyexperts.ops.cpu.threads import parallel_for
from tinyexperts.ops.expert_mlp.row_sums import sum_gradient_row
from tinyexperts.ops.expert_mlp.table_gradient import TableGradient
from tinyexperts.ops.row_adam.cpu import constants, update_elements, update_vectors

# Touched rows between the one that is updated and the one that is prefetched: as in cpu.py.
_AHEAD = 4
# Touched rows that are worth a part of their own.
_MIN_ROWS = 64


def row_adam_fused_(
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: TableGradient,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    step: int,
) -> None:
    """Apply one Adam step in place as tinyexperts.ops.row_adam_ does, with rows and gradients from `gradient`.

    It is for tables that `supports_deferred` accepts.
    """
    rows, _, _ = gradient.touched
    num_experts, num_vectors, dim = experts.shape
    one_a_vector = exp_avg_sq.dim() < experts.dim()
    shape = (num_experts, num_vectors, dim) if one_a_vector else (num_experts, num_vectors * dim)
    values = array_of(experts.detach().view(shape))
    parallel_for(
        _step_of_vectors if one_a_vector else _step_of_elements,
        len(rows),
        *gradient.kernel_arguments(),
        values,
        array_of(exp_avg.view(shape)),
        array_of(exp_avg_sq.view(shape[:2])),
        array_of(rows),
        (1, num_vectors, dim),
        constants(values.dtype, learning_rate, beta1, beta2, eps, weight_decay, step),
        min_items=_MIN_ROWS,
    )


@kernel
def _step_of_elements(
    order: Any,
    starts: Any,
    factors: Any,
    x: Any,
    grad_y: Any,
    num_retrieved: int,
    experts: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    rows: Any,
    shape: Any,
    constants: Any,
    start: int,
    stop: int,
) -> None:
    grad = np.empty(shape, dtype=x.dtype)
    flat_grad = grad.reshape(1, -1)
    for r in range(start, stop):
        sum_gradient_row(order, starts, factors, x, grad_y, num_retrieved, r, grad, 0)
        ahead = rows[min(r + _AHEAD, stop - 1)]
        update_elements(experts, exp_avg, exp_avg_sq, rows[r], ahead, flat_grad, 0, constants)


@kernel
def _step_of_vectors(
    order: Any,
    starts: Any,
    factors: Any,
    x: Any,
    grad_y: Any,
    num_retrieved: int,
    experts: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    rows: Any,
    shape: Any,
    constants: Any,
    start: int,
    stop: int,
) -> None:
    grad = np.empty(shape, dtype=x.dtype)
    for r in range(start, stop):
        sum_gradient_row(order, starts, factors, x, grad_y, num_retrieved, r, grad, 0)
        ahead = rows[min(r + _AHEAD, stop - 1)]
        update_vectors(experts, exp_avg, exp_avg_sq, rows[r], ahead, grad, 0, constants)
