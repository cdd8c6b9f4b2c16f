"""Exchanges between the ranks of a group by torch.distributed. All ranks call them together, with equal shapes.

T is the number of ranks. Outputs are made by new_empty or as contiguous: `empty_like` of a tensor that is not, as the
output of an all-to-all, gives wrong numbers in silence (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Their names before torch 2.13.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def all_gather_tokens(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the [M, ...] of each rank as [T*M, ...], rank by rank."""
    out = own.new_empty((group.size() * own.shape[0], *own.shape[1:]))
    getattr(dist, _ALL_GATHER)(out, own.contiguous(), group=group)
    return out


def reduce_scatter_products(parts_FMP: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the parts [F, T*M, P] of all ranks; return the sums of this rank's tokens, [F, M, P]."""
    num_vectors, num_tokens, num_retrieved = parts_FMP.shape
    by_rank = parts_FMP.view(num_vectors, group.size(), -1, num_retrieved).transpose(0, 1).contiguous()
    out = parts_FMP.new_empty((num_vectors, num_tokens // group.size(), num_retrieved))
    getattr(dist, _REDUCE_SCATTER)(out, by_rank.flatten(0, 1), group=group)
    return out


def scatter_columns(x_MD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange the tokens [M, D] of each rank for this rank's columns of all tokens, [T*M, D/T]."""
    num_tokens, num_ranks = len(x_MD), group.size()
    by_rank = x_MD.view(num_tokens, num_ranks, -1).transpose(0, 1).contiguous()
    # Not empty_like: of a tensor that is not contiguous it would give wrong gradients in silence.
    out = x_MD.new_empty((num_ranks * num_tokens, x_MD.shape[1] // num_ranks))
    dist.all_to_all_single(out, by_rank.flatten(0, 1), group=group)
    return out


def gather_columns(x_MC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange this rank's columns of all tokens, [T*M, D/T], for all columns of its own tokens, [M, D]."""
    out = torch.empty_like(x_MC, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x_MC.contiguous(), group=group)
    by_rank = out.view(group.size(), -1, x_MC.shape[1])
    return by_rank.transpose(0, 1).reshape(by_rank.shape[1], -1)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over the ranks on every rank. Its gradient is the sum of theirs."""
    total: Tensor = _SumOverRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out
