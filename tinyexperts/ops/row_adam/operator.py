"""The operator tinyexperts::row_adam_, which updates the touched rows of a table and of its two moments in place."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.define_operator import define_operator
from tinyexperts.ops.devices import check_one_device
from tinyexperts.ops.row_adam import cpu, portable
from tinyexperts.ops.row_adam.rounding import check_rounding_seed


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
    weight_decay: float = 0.0,
    step: int,
    rounding_seed: int | None = None,
) -> None:
    """Apply one Adam step in place to the touched rows of a table, as torch.optim.SparseAdam does.

    The arithmetic is fp32 (fp64 where the table is fp64), whatever the storage; the cost depends on R and never on N.
    The bits don't depend on the number of threads.

    Args:
        experts (float, [N, ...]): the table, updated in place; mostly [N, E, D].
        exp_avg (float, [N, ...]): running mean of the gradient, updated in place.
        exp_avg_sq (float, [N, ...] or without the last dimension, [N, E]): running mean of the squared gradient,
            updated in place. Its shape decides: a number an element, as in Adam, or a number a vector. The latter
            takes the mean over the vector's D squares, and its D elements share the denominator.
        rows (int64, [R]): the touched rows, 0 <= row < N, each named once.
        grad_rows (float, [R, ...]): their gradients.
        learning_rate (float), beta1 (float), beta2 (float), eps (float): as in torch.optim.SparseAdam: eps is added
            before the bias correction.
        weight_decay (float): as in torch.optim.AdamW: values shrink by learning_rate * weight_decay of themselves
            before the step; those of touched rows only.
        step (int): number of this step, counted from 1.
        rounding_seed (int | None): for a bf16 table: values are rounded up or down at random, so that their mean stays,
            by a hash of this seed (0 <= seed < 2^32) and the element's place (row_adam/rounding.py). Each step needs
            another one. None: to the nearest number, which forgets steps smaller than 1/512 of a value.

    Raises:
        InputError: shapes or a type of `rows` that don't fit, operands on several devices, a row outside 0..N - 1
            (checked on the CPU; elsewhere indexing asserts it, and Triton's kernel with TRITON_DEBUG=1), step < 1, a
            rounding_seed outside of its range or for a table that is not bf16.
    """
    if experts.dim() == 0:
        raise InputError("experts must have at least one dimension, got a scalar")
    if exp_avg.shape != experts.shape:
        raise InputError(f"exp_avg must have the table's shape {list(experts.shape)}, got {list(exp_avg.shape)}")
    if exp_avg_sq.shape != experts.shape and (experts.dim() == 1 or exp_avg_sq.shape != experts.shape[:-1]):
        one_a_vector = "" if experts.dim() == 1 else f", or {list(experts.shape[:-1])} for one number a vector"
        raise InputError(
            f"exp_avg_sq must have the table's shape {list(experts.shape)}{one_a_vector}, got {list(exp_avg_sq.shape)}"
        )
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise InputError(f"rows must be int64 of shape [R], got {rows.dtype} of shape {list(rows.shape)}")
    if grad_rows.shape != (rows.shape[0], *experts.shape[1:]):
        expected = [rows.shape[0], *experts.shape[1:]]
        raise InputError(f"grad_rows must hold one gradient a row, shape {expected}, got {list(grad_rows.shape)}")
    tables = {"experts": experts, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_one_device("row_adam_", **tables, rows=rows, grad_rows=grad_rows)
    if step < 1:
        raise InputError(f"step must be counted from 1, got {step}")
    check_rounding_seed(experts, rounding_seed)
    # A parameter may be given as it is: an update is never differentiated.
    with torch.no_grad():
        _row_adam_(
            *(experts, exp_avg, exp_avg_sq, rows, grad_rows),
            *(learning_rate, beta1, beta2, eps, weight_decay, step, rounding_seed),
        )


_row_adam_ = define_operator(
    "row_adam_",
    portable.row_adam_,
    cpu.row_adam_,
    gpu_kernel="tinyexperts.ops.row_adam.gpu:ROW_ADAM",
    mutates_args=("experts", "exp_avg", "exp_avg_sq"),
)
