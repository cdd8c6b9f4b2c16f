"""Adam on the touched rows straight from a gradient in deferred form; on the CPU it must match row_adam_ to the bit.

Each row's gradient is summed into a buffer that stays in the cache and used there; it is never written to memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tinyexperts.ops.cpu.compile import array_of, kernel
from tinyexperts.ops.cpu.threads import parallel_for
from tinyexperts.ops.expert_mlp import portable as portable_experts
from tinyexperts.ops.expert_mlp.row_sums import sum_gradient_row
from tinyexperts.ops.expert_mlp.sorted_pairs import ids_of_pairs
from tinyexperts.ops.expert_mlp.table_gradient import TableGradient
from tinyexperts.ops.expert_mlp.table_gradient_gpu import GpuTableGradient
from tinyexperts.ops.gpu.dispatch import on_gpu
from tinyexperts.ops.row_adam import portable
from tinyexperts.ops.row_adam.cpu import constants, update_elements, update_vectors
from tinyexperts.ops.row_adam.rounding import check_rounding_seed
from tinyexperts.ops.row_adam.rounding_cpu import key_of

# Touched rows between the one that is updated and the one that is prefetched: as in cpu.py.
_AHEAD = 4
# Touched rows that are worth a part of their own.
_MIN_ROWS = 64


def row_adam_fused_(
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: TableGradient | GpuTableGradient,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    step: int,
    rounding_seed: int | None = None,
) -> None:
    """Apply one Adam step in place as tinyexperts.ops.row_adam_ does, with rows and gradients from `gradient`.

    It is for tables that `supports_deferred` accepts.

    Raises:
        InputError: a rounding_seed outside of its range or for a table that is not bf16.
    """
    check_rounding_seed(experts, rounding_seed)
    if isinstance(gradient, GpuTableGradient):
        tables = experts.detach(), exp_avg, exp_avg_sq
        operands = *gradient.pairs, gradient.factors_EMP, gradient.x_MD, gradient.grad_y_MD
        options = learning_rate, beta1, beta2, eps, weight_decay, step, rounding_seed
        _row_adam_on_gpu(*tables, *operands, *options)
        return
    rows, _, _ = gradient.touched
    num_experts, num_vectors, dim = experts.shape
    one_a_vector = exp_avg_sq.dim() < experts.dim()
    shape = (num_experts, num_vectors, dim) if one_a_vector else (num_experts, num_vectors * dim)
    first_moments = array_of(exp_avg.view(shape))
    parallel_for(
        _step_of_vectors if one_a_vector else _step_of_elements,
        len(rows),
        *gradient.kernel_arguments(),
        array_of(experts.detach().view(shape)),
        first_moments,
        array_of(exp_avg_sq.view(shape[:2])),
        array_of(rows),
        (1, num_vectors, dim),
        constants(first_moments.dtype, learning_rate, beta1, beta2, eps, weight_decay, step),
        key_of(rounding_seed),
        min_items=_MIN_ROWS,
    )


def _portable_row_adam_(
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sorted_experts: Tensor,
    order: Tensor,
    factors_EMP: Tensor,
    x_MD: Tensor,
    grad_y_MD: Tensor,
    *options: Any,
) -> None:
    """Write the gradient out and use it."""
    ids_MP = ids_of_pairs(sorted_experts, order, factors_EMP.shape[2])
    gradient = portable_experts.gradient_rows(ids_MP, factors_EMP, x_MD, grad_y_MD, factors_EMP)
    portable.row_adam_(experts, exp_avg, exp_avg_sq, *gradient, *options)


_row_adam_on_gpu = on_gpu("tinyexperts.ops.row_adam.fused_gpu:ROW_ADAM_FUSED", _portable_row_adam_)


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
    key: Any,
    start: int,
    stop: int,
) -> None:
    grad = np.empty(shape, dtype=x.dtype)
    flat_grad = grad.reshape(1, -1)
    for r in range(start, stop):
        sum_gradient_row(order, starts, factors, x, grad_y, num_retrieved, r, grad, 0)
        ahead = rows[min(r + _AHEAD, stop - 1)]
        update_elements(experts, exp_avg, exp_avg_sq, rows[r], ahead, flat_grad, 0, constants, key)


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
    key: Any,
    start: int,
    stop: int,
) -> None:
    grad = np.empty(shape, dtype=x.dtype)
    for r in range(start, stop):
        sum_gradient_row(order, starts, factors, x, grad_y, num_retrieved, r, grad, 0)
        ahead = rows[min(r + _AHEAD, stop - 1)]
        update_vectors(experts, exp_avg, exp_avg_sq, rows[r], ahead, grad, 0, constants, key)
