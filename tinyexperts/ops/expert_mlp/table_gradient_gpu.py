"""The gradient of a table as the pairs that it is made of, on CUDA devices; table_gradient.py is its twin on the CPU.

A step needs no wait for the device: the number of touched rows is never asked for.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from tinyexperts.ops.expert_mlp import portable
from tinyexperts.ops.expert_mlp.sorted_pairs import SortedPairs, ids_of_pairs, sort_pairs
from tinyexperts.ops.gpu.dispatch import on_gpu, why_not
from tinyexperts.ops.gpu.launch import MAX_DIM

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports_deferred_on_gpu(table: Tensor) -> bool:
    """Return True for contiguous tables [N, E, D] on a CUDA device, where Triton's kernels sum their rows."""
    has_kernels = table.device.type == "cuda" and why_not(table.device) is None
    is_within_limits = table.dim() == 3 and 1 <= table.shape[-1] <= MAX_DIM and len(table) < 2**31
    return has_kernels and is_within_limits and table.dtype in _TYPES and table.is_contiguous()


class GpuTableGradient:
    """The gradient of one backward pass. It shares no memory with tensors that autograd or its user may change later.

    Args:
        ids_MP (int64, [M, P]): the experts of each token.
        factors_EMP (fp32, [E, M, P]): those of the backward pass; only the gradient may use them now.
        x_MD (float, [M, D]): the tokens.
        grad_y_MD (float, [M, D]): the gradient of their outputs.
        table_NED (float, [N, E, D]): the table, of which the shape and the type are used.
    """

    def __init__(self, ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, table_NED: Tensor) -> None:
        self.ids_MP, self.factors_EMP = ids_MP, factors_EMP
        self.grad_y_MD = grad_y_MD.clone(memory_format=torch.contiguous_format)
        # Values alone (E = 1) take nothing from the tokens.
        has_x = len(factors_EMP) > 1
        self.x_MD = x_MD.clone(memory_format=torch.contiguous_format) if has_x else self.grad_y_MD
        self._like_NED = table_NED.detach()

    @cached_property
    def pairs(self) -> SortedPairs:
        """The pairs, sorted by expert."""
        return sort_pairs(self.ids_MP)

    def rows_and_values(self) -> tuple[Tensor, Tensor]:
        """Return the touched rows [R], ascending, and their gradients [R, E, D], written out; waits for the device."""
        rows, values = torch.ops.tinyexperts.expert_mlp_gradient_rows(
            self.ids_MP, self.factors_EMP, self.x_MD, self.grad_y_MD, self._like_NED
        )
        return rows, values

    def squared_norm(self) -> Tensor:
        """Return the sum of all squares (fp64, scalar), without writing the gradient out."""
        squares: Tensor = _squared_norm(*self.pairs, self.factors_EMP, self.x_MD, self.grad_y_MD)
        return squares.double().sum()

    def scale_(self, factor: Tensor) -> None:
        """Multiply the gradient."""
        self.factors_EMP.mul_(factor)


def _portable_squared_norm(
    experts: Tensor, order: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor
) -> Tensor:
    """Return squares (fp32, or fp64 for fp64 factors, [1]) whose sum is that of the gradient's squares."""
    ids_MP = ids_of_pairs(experts, order, factors_EMP.shape[2])
    _, values = portable.gradient_rows(ids_MP, factors_EMP, x_MD, grad_y_MD, factors_EMP)
    return values.square().sum().view(1)


_squared_norm = on_gpu("tinyexperts.ops.expert_mlp.gpu_sums:SQUARED_NORM", _portable_squared_norm)
