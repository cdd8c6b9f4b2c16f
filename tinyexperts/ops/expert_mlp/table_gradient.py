"""The gradient of a table as the pairs that it is made of: summed row by row only where each row is used at once.

Written out, the gradient of the touched rows is the largest tensor of a training step, and writing and reading it costs
as much as the experts' forward pass. What it is made of is small: a factor for each pair and vector, the tokens, and
the gradient of their outputs. An optimiser that has asked for it (`ask_for`) finds it on the parameter and sums each
row when it updates it. For tables on the CPU, in fp32 or fp64.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.ops.cpu_threads import in_parts
from tinyexperts.ops.expert_mlp import cpu
from tinyexperts.ops.expert_mlp.touched_rows import sum_row, sum_touched_rows, touched_rows
from tinyexperts.ops.numba_kernel import array_of, kernel

# Parts of the rows whose squares are summed apart: so many always, that the sum doesn't depend on the threads.
_NUM_PARTS = 64


class TableGradient:
    """The gradient of one backward pass.

    Args:
        ids_MP (int64, [M, P]), factors_EMP (fp32 or fp64, [E, M, P]), x_MD and grad_y_MD ([M, D]): as in cpu.py; where
            E = 1, x_MD may be [0, D], since nothing is made of it.
    """

    def __init__(self, ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor) -> None:
        self.factors_EMP = factors_EMP
        self.x_MD, self.grad_y_MD = (t.to(factors_EMP.dtype).contiguous() for t in (x_MD, grad_y_MD))
        self._ids_MP = ids_MP

    @cached_property
    def touched(self) -> tuple[Tensor, Tensor, Tensor]:
        """Touched ids [R], ascending; the pairs sorted by id; where each row's pairs start, and their end."""
        return touched_rows(self._ids_MP)

    def kernel_arguments(self) -> tuple[Any, ...]:
        """What `sum_row` wants first."""
        _, order, starts = self.touched
        tensors = (order, starts, self.factors_EMP.flatten(1), self.x_MD, self.grad_y_MD)
        return *(array_of(tensor) for tensor in tensors), self.factors_EMP.shape[2]

    def rows_and_values(self) -> tuple[Tensor, Tensor]:
        """The touched rows [R], ascending, and their gradients [R, E, D], written out."""
        rows, order, starts = self.touched
        return rows, sum_touched_rows(order, starts, self.factors_EMP, self.x_MD, self.grad_y_MD)

    def squared_norm(self) -> Tensor:
        """The sum of all squares (fp64, scalar), without writing the gradient out."""
        rows, _, _ = self.touched
        sums = torch.zeros(_NUM_PARTS, dtype=torch.float64)
        shape = (1, len(self.factors_EMP), self.x_MD.shape[1])
        in_parts(_sum_squares, _NUM_PARTS, *self.kernel_arguments(), shape, len(rows), array_of(sums))
        return sums.sum()

    def scale_(self, factor: float) -> None:
        """Multiply the gradient."""
        self.factors_EMP.mul_(factor)


@kernel
def _sum_squares(
    order: Any,
    starts: Any,
    factors: Any,
    x: Any,
    grad_y: Any,
    num_retrieved: int,
    shape: Any,
    num_rows: int,
    sums: Any,
    start: int,
    stop: int,
) -> None:
    row = np.empty(shape, dtype=x.dtype)
    for part in range(start, stop):
        total = 0.0
        for r in range(part * num_rows // len(sums), (part + 1) * num_rows // len(sums)):
            sum_row(order, starts, factors, x, grad_y, num_retrieved, r, row, 0)
            squares = x.dtype.type(0)
            for vector in range(shape[1]):
                for d in range(shape[2]):
                    squares += row[0, vector, d] * row[0, vector, d]
            total += squares
        sums[part] = total


def can_be_left(table: Tensor) -> bool:
    """For contiguous tables on the CPU, in fp32 or fp64."""
    return table.device.type == "cpu" and table.dtype in (torch.float32, torch.float64) and table.is_contiguous()


def ask_for(table: Tensor) -> None:
    """From now on backward passes leave the table's gradient in `asked_for(table)`, and its `.grad` as it is.

    For an optimiser that looks there. A hook on the table keeps its gradient in `.grad`, where the hook sees it.
    """
    table._table_gradients = []  # type: ignore[attr-defined]


def asked_for(table: Tensor) -> list[TableGradient] | None:
    """The gradients that backward passes have left since the optimiser's last step; None where none was asked for."""
    gradients: list[TableGradient] | None = getattr(table, "_table_gradients", None)
    return gradients


def mark_column_shard(table: Tensor) -> None:
    """Note that the table holds a part of the columns: a mean over D can't be taken of it."""
    table._column_shard = True  # type: ignore[attr-defined]


def is_column_shard(table: Tensor) -> bool:
    """Whether `mark_column_shard` has been called."""
    return getattr(table, "_column_shard", False)


def is_deferred(table: Tensor) -> bool:
    """Whether the next forward pass is to leave its gradient for the optimiser."""
    return (
        asked_for(table) is not None
        and can_be_left(table)
        and table.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not table._backward_hooks
        and not getattr(table, "_post_accumulate_grad_hooks", None)
    )


class _DeferredExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, experts_NED: Tensor, ids_MP: Tensor, weights_MP: Tensor, activation: str | None
    ) -> Tensor:
        y, pre_activations = cpu.expert_mlp(x_MD, experts_NED, ids_MP, weights_MP, activation)
        ctx.save_for_backward(x_MD, experts_NED, ids_MP, weights_MP, pre_activations)
        # Noted here: activation checkpointing gives the backward pass another tensor for the table.
        ctx.activation, ctx.gradients = activation, asked_for(experts_NED)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, experts_NED, ids_MP, weights_MP, pre_activations = ctx.saved_tensors
        grad_x, grad_weights, factors = cpu.backward_of_tokens(
            grads[0], x_MD, experts_NED, ids_MP, weights_MP, pre_activations, ctx.activation
        )
        ctx.gradients.append(TableGradient(ids_MP, factors, x_MD, grads[0]))
        return grad_x, None, None, grad_weights, None


def expert_mlp_deferred(
    x_MD: Tensor, experts_NED: Tensor, ids_MP: Tensor, weights_MP: Tensor, activation: str | None
) -> Tensor:
    """As tinyexperts.ops.expert_mlp, but the table's gradient is left in `asked_for(experts_NED)`."""
    y: Tensor = _DeferredExpertMLP.apply(x_MD, experts_NED, ids_MP, weights_MP, activation)  # type: ignore[no-untyped-call]
    return y
