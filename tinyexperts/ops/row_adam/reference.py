"""Adam on the touched rows of a table, row by row: the truth that every kernel of this operation must match.

It must match torch.optim.SparseAdam: a row that the step does not touch keeps its value and both of its moments (they
do not decay), and the bias corrections count the table's steps, not the row's. Adam is Kingma & Ba 2014 (arXiv
1412.6980), algorithm 1; its weight decay is AdamW's (Loshchilov & Hutter 2017, arXiv 1711.05101), of touched rows only;
one second moment for the many parameters of a vector is Adam-mini's (Zhang et al. 2024, arXiv 2406.16793).
rounding.py has the rounding of bf16 tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.ops.row_adam.rounding import round_stochastically


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
    dtype = torch.promote_types(experts.dtype, torch.float32)
    one_a_vector = exp_avg_sq.dim() < experts.dim()
    for row, grad in zip(rows.tolist(), grad_rows.to(dtype), strict=True):
        value, first, second = (table[row].to(dtype) for table in (experts, exp_avg, exp_avg_sq))
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * (grad.square().mean(-1) if one_a_vector else grad.square())
        exp_avg[row], exp_avg_sq[row] = first, second
        # SparseAdam adds eps before it corrects the bias of the second moment.
        denominator = (second.sqrt() + eps) / (1 - beta2**step) ** 0.5
        direction = first / (1 - beta1**step) / (denominator.unsqueeze(-1) if one_a_vector else denominator)
        value = value - learning_rate * weight_decay * value - learning_rate * direction
        if rounding_seed is not None and experts.dtype == torch.bfloat16:
            elements = row * value.numel() + torch.arange(value.numel()).view(value.shape)
            value = round_stochastically(value, elements, rounding_seed)
        experts[row] = value
