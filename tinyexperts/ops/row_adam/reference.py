"""Adam on the touched rows of a table, in plain torch: the truth that faster kernels must match.

Must match torch.optim.SparseAdam: a row that the step does not touch keeps its value and both of its moments (they do
not decay), and the bias corrections count the table's steps, not the row's. Adam is Kingma & Ba 2014 (arXiv 1412.6980),
algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_adam_reference_(
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
    """Update experts, exp_avg and exp_avg_sq in place at `rows`; arguments as in tinyexperts.ops.row_adam_."""
    accumulate_dtype = torch.promote_types(experts.dtype, torch.float32)
    grad = grad_rows.to(accumulate_dtype)
    first = exp_avg.index_select(0, rows).to(accumulate_dtype)
    second = exp_avg_sq.index_select(0, rows).to(accumulate_dtype)
    first = first + (1 - beta1) * (grad - first)
    second = second + (1 - beta2) * (grad.square() - second)
    step_size = learning_rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    value = experts.index_select(0, rows).to(accumulate_dtype) - step_size * (first / (second.sqrt() + eps))
    # The rows are unique, so a copy is exact and, unlike an indexed add, the same on every device.
    exp_avg.index_copy_(0, rows, first.to(exp_avg.dtype))
    exp_avg_sq.index_copy_(0, rows, second.to(exp_avg_sq.dtype))
    experts.index_copy_(0, rows, value.to(experts.dtype))
