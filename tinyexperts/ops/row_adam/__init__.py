"""The operator tinyexperts::row_adam_, which updates the touched rows of a table and of its two moments in place."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.row_adam.reference import row_adam_reference_

_row_adam_ = torch.library.custom_op(
    "tinyexperts::row_adam_", row_adam_reference_, mutates_args=("experts", "exp_avg", "exp_avg_sq")
)


@_row_adam_.register_fake
def _(
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    return None


def row_adam_(
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """Apply one Adam step in place to the touched rows of a table, as torch.optim.SparseAdam does.

    The arithmetic is fp32 (fp64 where the table is fp64), whatever the storage; the cost depends on R and never on N.

    experts (float, [N, ...]): the table, updated in place
    exp_avg (float, [N, ...]): running mean of the gradient, updated in place
    exp_avg_sq (float, [N, ...]): running mean of the squared gradient, updated in place
    rows (int64, [R]): the touched rows, each named once
    grad_rows (float, [R, ...]): their gradients
    learning_rate, beta1, beta2, eps: as in torch.optim.Adam
    step: number of this step, counted from 1

    Raises InputError where shapes or the type of `rows` do not fit, or step < 1.
    """
    if exp_avg.shape != experts.shape or exp_avg_sq.shape != experts.shape:
        raise InputError(
            f"exp_avg and exp_avg_sq must have the table's shape {list(experts.shape)}, "
            f"got {list(exp_avg.shape)} and {list(exp_avg_sq.shape)}"
        )
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise InputError(f"rows must be int64 of shape [R], got {rows.dtype} of shape {list(rows.shape)}")
    if grad_rows.shape != (rows.shape[0], *experts.shape[1:]):
        expected = [rows.shape[0], *experts.shape[1:]]
        raise InputError(f"grad_rows must hold one gradient a row, shape {expected}, got {list(grad_rows.shape)}")
    if step < 1:
        raise InputError(f"step must be counted from 1, got {step}")
    # A parameter may be given as it is: an update is never itself differentiated.
    with torch.no_grad():
        _row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, learning_rate, beta1, beta2, eps, step)
