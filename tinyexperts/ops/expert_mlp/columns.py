"""The sum of a token's experts from a table whose columns are on several ranks; must match reference.py on the whole.

Rank r of a group of T has the columns experts[:, :, r*D/T : (r+1)*D/T] and M tokens of its own. A token sends, as
elements (P retrieved experts, E = 2):

    forward    x to the ranks of its columns                                   D (T-1)/T     all-to-all
               its ids to all                                                  P (T-1)       all-gather
               from each rank its part of the products                         P (T-1)       reduce-scatter
               the coefficients of its experts to all                          P (T-1)       all-gather
               from each rank the columns of y                                 D (T-1)/T     all-to-all
    backward   grad_y, the products of grad_y with v, the factors, grad_x: the same without the ids

Without an activation (E = 1) no expert reads x, and x, the products, the factors and grad_x are not sent.

All shapes are static, whatever the router does. Groups may be replicated: a rank's columns are then those of the rank
at its place in every other group, and the table's gradient is summed over all of them, from the pairs that it is made
of, so that replicas stay equal to the bit.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyexperts.ops.collectives import all_gather_tokens, gather_columns, reduce_scatter_products, scatter_columns
from tinyexperts.ops.define_operator import define_operator
from tinyexperts.ops.expert_mlp import columns_cpu, portable
from tinyexperts.ops.expert_mlp.operator import make_table_gradient
from tinyexperts.ops.expert_mlp.portable import accumulation_dtype, coefficients, derivatives
from tinyexperts.ops.rank_groups import RankGroups


def expert_mlp_in_columns(
    x_MD: Tensor,
    experts_NEC: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    groups: RankGroups,
    *,
    sparse: bool,
) -> Tensor:
    """Compute `expert_mlp` of a table in columns. All ranks of the group call it together, with equally many tokens M.

    Args:
        x_MD (float, [M, D]): this rank's tokens.
        experts_NEC (float, [N, E, C]): this rank's C = D/T columns of the table.
        ids_MP (int64, [M, P]): the experts of this rank's tokens, by their ids in the whole table.
        weights_MP (float, [M, P]): their router weights.
        activation (str or None): as in `expert_mlp`.
        groups (RankGroups): the ranks that hold the other columns, and the replicas.
        sparse (bool): as in `expert_mlp`.

    Returns:
        y_MD (dtype of x, [M, D]).

    The gradient of experts_NEC is that of the tokens of all ranks and replicas, summed.
    """
    y: Tensor = _ExpertsInColumns.apply(x_MD, experts_NEC, ids_MP, weights_MP, activation, groups, sparse)  # type: ignore[no-untyped-call]
    return y


class ColumnShard(nn.Parameter):
    """A part of the columns of a table: a mean over D can't be taken of it. A copy is one, too."""


_products = define_operator("expert_mlp_products", portable.products, columns_cpu.products)
_weighted_sum = define_operator("expert_mlp_weighted_sum", portable.weighted_sum, columns_cpu.weighted_sum)


class _ExpertsInColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        experts_NEC: Tensor,
        ids_MP: Tensor,
        weights_MP: Tensor,
        activation: str | None,
        groups: RankGroups,
        sparse: bool,
    ) -> Tensor:
        dtype = accumulation_dtype(x_MD, experts_NEC)
        last = experts_NEC.shape[1] - 1
        group = groups.column_ranks
        ids_of_all = all_gather_tokens(ids_MP, group)
        x_of_all = x_MD.new_empty((0, experts_NEC.shape[2]), dtype=dtype)
        pre, coefficient = weights_MP.new_empty((0, *weights_MP.shape), dtype=dtype), weights_MP.to(dtype)
        if activation is not None:
            x_of_all = scatter_columns(x_MD.to(dtype), group)
            pre = reduce_scatter_products(_products(x_of_all, experts_NEC, ids_of_all, 0, last), group)
            coefficient = coefficient * coefficients(pre, activation)
        coefficient_of_all = all_gather_tokens(coefficient, group)
        y_of_all = _weighted_sum(coefficient_of_all.unsqueeze(0), experts_NEC, ids_of_all, last)
        ctx.save_for_backward(x_of_all, experts_NEC, ids_of_all, weights_MP, pre, coefficient_of_all)
        ctx.activation, ctx.groups, ctx.sparse = activation, groups, sparse
        ctx.table = weakref.ref(experts_NEC)
        return gather_columns(y_of_all, group).to(x_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_of_all, experts_NEC, ids_of_all, weights_MP, pre, coefficient_of_all = ctx.saved_tensors
        group, activation = ctx.groups.column_ranks, ctx.activation
        last = experts_NEC.shape[1] - 1
        grad_y_of_all = scatter_columns(grads[0].to(x_of_all.dtype), group)
        products = _products(grad_y_of_all, experts_NEC, ids_of_all, last, 1)
        grad_coefficient = reduce_scatter_products(products, group)[0]
        grad_weights, grad_x = grad_coefficient, torch.zeros_like(grads[0])
        factors_of_all = coefficient_of_all.unsqueeze(0)
        if activation is not None:
            grad_weights = grad_coefficient * coefficients(pre, activation)
            grad_pre = grad_coefficient * weights_MP * derivatives(pre, activation)
            grad_pre_of_all = torch.stack([all_gather_tokens(part, group) for part in grad_pre])
            grad_x = gather_columns(_weighted_sum(grad_pre_of_all, experts_NEC, ids_of_all, 0), group)
            factors_of_all = torch.cat([grad_pre_of_all, factors_of_all])
        grad_experts = None
        if ctx.needs_input_grad[1]:
            operands = _gather_replicas(ids_of_all, factors_of_all, x_of_all, grad_y_of_all, ctx.groups.replica_ranks)
            grad_experts = make_table_gradient(ctx, *operands, experts_NEC)
        return grad_x.to(grads[0].dtype), grad_experts, None, grad_weights.to(weights_MP.dtype), None, None, None


def _gather_replicas(
    ids_MP: Tensor, factors_EMP: Tensor, x_MC: Tensor, grad_y_MC: Tensor, replica_ranks: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the operands of the table's gradient, for the tokens of all replicas."""
    if replica_ranks is None:
        return ids_MP, factors_EMP, x_MC, grad_y_MC
    factors_EMP = torch.stack([all_gather_tokens(factors, replica_ranks) for factors in factors_EMP])
    x_MC = all_gather_tokens(x_MC, replica_ranks) if len(x_MC) else x_MC
    return all_gather_tokens(ids_MP, replica_ranks), factors_EMP, x_MC, all_gather_tokens(grad_y_MC, replica_ranks)
