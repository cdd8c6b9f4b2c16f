"""Adam on the touched rows of a table in plain torch, all of them at once, for devices without a kernel of their own.

It must match reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinyexperts.ops.indices import check_indices
from tinyexperts.ops.row_adam.rounding import store_rows


def bias_corrected_rate(learning_rate: float, beta1: float, beta2: float, step: int) -> float:
    """Return the learning rate times both bias corrections of a step, counted from 1."""
    return learning_rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)


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
    if grad_rows.numel() == 0:
        return
    check_indices("rows", rows, len(experts))
    accumulate_dtype = torch.promote_types(experts.dtype, torch.float32)
    grad = grad_rows.to(accumulate_dtype)
    first = exp_avg.index_select(0, rows).to(accumulate_dtype)
    second = exp_avg_sq.index_select(0, rows).to(accumulate_dtype)
    value = experts.index_select(0, rows).to(accumulate_dtype)
    one_a_vector = exp_avg_sq.dim() < experts.dim()
    first = first + (1 - beta1) * (grad - first)
    squared = grad.square().mean(-1) if one_a_vector else grad.square()
    second = second + (1 - beta2) * (squared - second)
    denominator = second.sqrt() + eps
    if one_a_vector:
        denominator = denominator.unsqueeze(-1)
    rate = bias_corrected_rate(learning_rate, beta1, beta2, step)
    value = (1 - learning_rate * weight_decay) * value - rate * (first / denominator)
    store_rows(exp_avg, rows, first, None)
    store_rows(exp_avg_sq, rows, second, None)
    store_rows(experts, rows, value, rounding_seed)
