"""The gradient of a table as the pairs that it is made of: summed row by row only where each row is used at once.

Written out, the gradient of the touched rows is the largest tensor of a training step, and writing and reading it costs
as much as the experts' forward pass. What it is made of is small: a factor for each pair and vector, the tokens, and
the gradient of their outputs. row_adam/fused.py sums each row when it updates it. It is for tables on the CPU in fp32,
fp64 or bf16, of which the sums are fp32 (table_gradient_gpu.py has those of CUDA devices); deferred.py decides when a
backward pass keeps its gradient in this form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.ops.cpu.compile import array_of, kernel
from tinyexperts.ops.cpu.threads import parallel_for
from tinyexperts.ops.expert_mlp.row_sums import find_touched_rows, sum_gradient_row, sum_gradient_rows

# Parts of the rows whose squares are summed apart. Their number is fixed, so that the threads don't change the sum.
_NUM_PARTS = 64


class TableGradient:
    """The gradient of one backward pass. It shares no memory with tensors that autograd or its user may change later.

    Args:
        ids_MP (int64, [M, P]): the experts of each token.
        factors_EMP (fp32 or fp64, [E, M, P]): those of cpu.py's backward pass; only the gradient may use them now.
        x_MD (float, [M, D]): the tokens.
        grad_y_MD (float, [M, D]): the gradient of their outputs.
    """

    def __init__(self, ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor) -> None:
        self.factors_EMP = factors_EMP
        if len(factors_EMP) == 1:  # nothing is made of the tokens
            x_MD = x_MD[:0]
        self.x_MD, self.grad_y_MD = (
            t.to(factors_EMP.dtype, copy=True, memory_format=torch.contiguous_format) for t in (x_MD, grad_y_MD)
        )
        self.touched = find_touched_rows(ids_MP)
        """The touched rows [R], ascending, the pairs sorted by row, and where each row's pairs start, and their end."""

    def kernel_arguments(self) -> tuple[Any, ...]:
        """Return the first arguments of `sum_gradient_row`."""
        _, order, starts = self.touched
        tensors = (order, starts, self.factors_EMP.flatten(1), self.x_MD, self.grad_y_MD)
        return *(array_of(tensor) for tensor in tensors), self.factors_EMP.shape[2]

    def rows_and_values(self) -> tuple[Tensor, Tensor]:
        """Return the touched rows [R], ascending, and their gradients [R, E, D], written out."""
        rows, order, starts = self.touched
        return rows, sum_gradient_rows(order, starts, self.factors_EMP, self.x_MD, self.grad_y_MD)

    def squared_norm(self) -> Tensor:
        """Return the sum of all squares (fp64, scalar), without writing the gradient out."""
        rows, _, _ = self.touched
        sums = torch.zeros(_NUM_PARTS, dtype=torch.float64, device="cpu")
        shape = (1, len(self.factors_EMP), self.x_MD.shape[1])
        parallel_for(_sum_squares, _NUM_PARTS, *self.kernel_arguments(), shape, len(rows), array_of(sums))
        return sums.sum()

    def scale_(self, factor: Tensor) -> None:
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
    """Sum the squares of the parts start..stop, each row in its own type and the rows in fp64."""
    row = np.empty(shape, dtype=x.dtype)
    for part in range(start, stop):
        total = 0.0
        for r in range(part * num_rows // len(sums), (part + 1) * num_rows // len(sums)):
            sum_gradient_row(order, starts, factors, x, grad_y, num_retrieved, r, row, 0)
            squares = x.dtype.type(0)
            for vector in range(shape[1]):
                for d in range(shape[2]):
                    squares += row[0, vector, d] * row[0, vector, d]
            total += squares
        sums[part] = total
