"""The sum of a token's experts from a table whose columns lie on several ranks; must match reference.py on the whole.

Rank r of a group of T has the columns experts[:, :, r*D/T : (r+1)*D/T] and M tokens of its own. A token sends, as
elements (P retrieved experts, E = 2):

    forward    x to the ranks of its columns                                   D (T-1)/T     all-to-all
               its ids to all                                                  P (T-1)       all-gather
               from each rank its part of the products                         P (T-1)       reduce-scatter
               the coefficients of its experts to all                          P (T-1)       all-gather
               from each rank the columns of y                                 D (T-1)/T     all-to-all
    backward   grad_y, the products of grad_y with v, the factors, grad_x: the same without the ids

Without an activation (E = 1) no expert reads x, and x, the products, the factors and grad_x stay at home.

All shapes are static, whatever the router does. Groups may be replicated: a rank's columns are then those of the rank
at its place in every other group, and the table's gradient is summed over all of them, from the pairs that it is made
of, so that replicas stay equal to the bit.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tinyexperts.ops.activation import activate, activation_derivative
from tinyexperts.ops.collectives import all_gather_tokens, gather_columns, reduce_scatter_products, scatter_columns
from tinyexperts.ops.cpu.compile import JIT_IS_DISABLED
from tinyexperts.ops.expert_mlp import columns_cpu, cpu, portable
from tinyexperts.ops.expert_mlp.deferred import defer_gradient, deferring_table
from tinyexperts.ops.expert_mlp.reference import accumulation_dtype, coefficients
from tinyexperts.ops.expert_mlp.row_sums import sparse_gradient
from tinyexperts.ops.expert_mlp.table_gradient import TableGradient
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
    """As `expert_mlp`, called by all ranks of the group together, each with as many tokens M.

    Args:
        x_MD (float, [M, D]): this rank's tokens.
        experts_NEC (float, [N, E, C]): this rank's C = D/T columns of the table.
        ids_MP (int64, [M, P]), weights_MP (float, [M, P]): of this rank's tokens; ids are those of the whole table.
        sparse: as in `expert_mlp`.

    Returns:
        y_MD (dtype of x, [M, D]).

    The gradient of experts_NEC is that of the tokens of all ranks and replicas, summed.
    """
    y: Tensor = _ExpertsInColumns.apply(x_MD, experts_NEC, ids_MP, weights_MP, activation, groups, sparse)  # type: ignore[no-untyped-call]
    return y


class ColumnShard(nn.Parameter):
    """A part of the columns of a table: a mean over D can't be taken of it. A copy is one, too."""


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not JIT_IS_DISABLED


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
        steps = columns_cpu if _has_kernels(x_MD) else portable
        last = experts_NEC.shape[1] - 1
        group = groups.column_ranks
        ids_of_all = all_gather_tokens(ids_MP, group)
        x_of_all = x_MD.new_empty((0, experts_NEC.shape[2]), dtype=dtype)
        pre, coefficient = weights_MP.new_empty((0, *weights_MP.shape), dtype=dtype), weights_MP.to(dtype)
        if activation is not None:
            x_of_all = scatter_columns(x_MD.to(dtype), group)
            pre = reduce_scatter_products(steps.products(x_of_all, experts_NEC, ids_of_all, 0, last), group)
            coefficient = coefficient * coefficients(pre, activation)
        coefficient_of_all = all_gather_tokens(coefficient, group)
        y_of_all = steps.weighted_sum(coefficient_of_all.unsqueeze(0), experts_NEC, ids_of_all, last)
        ctx.save_for_backward(x_of_all, experts_NEC, ids_of_all, weights_MP, pre, coefficient_of_all)
        ctx.activation, ctx.groups, ctx.sparse, ctx.steps = activation, groups, sparse, steps
        ctx.table = weakref.ref(experts_NEC)
        return gather_columns(y_of_all, group).to(x_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_of_all, experts_NEC, ids_of_all, weights_MP, pre, coefficient_of_all = ctx.saved_tensors
        steps, group, activation = ctx.steps, ctx.groups.column_ranks, ctx.activation
        last = experts_NEC.shape[1] - 1
        grad_y_of_all = scatter_columns(grads[0].to(x_of_all.dtype), group)
        products = steps.products(grad_y_of_all, experts_NEC, ids_of_all, last, 1)
        grad_coefficient = reduce_scatter_products(products, group)[0]
        grad_weights, grad_x = grad_coefficient, torch.zeros_like(grads[0])
        factors_of_all = coefficient_of_all.unsqueeze(0)
        if activation is not None:
            grad_weights = grad_coefficient * coefficients(pre, activation)
            grad_pre = torch.stack([grad_coefficient * weights_MP * part for part in _derivatives(pre, activation)])
            grad_pre_of_all = torch.stack([all_gather_tokens(part, group) for part in grad_pre])
            grad_x = gather_columns(steps.weighted_sum(grad_pre_of_all, experts_NEC, ids_of_all, 0), group)
            factors_of_all = torch.cat([grad_pre_of_all, factors_of_all])
        grad_experts = None
        if ctx.needs_input_grad[1]:
            grad_experts = _table_gradient(ctx, experts_NEC, ids_of_all, factors_of_all, x_of_all, grad_y_of_all)
        return grad_x.to(grads[0].dtype), grad_experts, None, grad_weights.to(weights_MP.dtype), None, None, None


def _derivatives(pre_FMP: Tensor, activation: str) -> list[Tensor]:
    """Of what multiplies v, by each product."""
    derivative = activation_derivative(pre_FMP[0], activation)
    if len(pre_FMP) == 1:
        return [derivative]
    return [derivative * pre_FMP[1], activate(pre_FMP[0], activation)]


def _table_gradient(
    ctx: Any, experts_NEC: Tensor, ids_MP: Tensor, factors_EMP: Tensor, x_MC: Tensor, grad_y_MC: Tensor
) -> Tensor | None:
    """Of the tokens of all replicas; None where it has been left in deferred form."""
    if ctx.groups.replica_ranks is not None:
        ids_MP, grad_y_MC = (all_gather_tokens(t, ctx.groups.replica_ranks) for t in (ids_MP, grad_y_MC))
        factors_EMP = torch.stack([all_gather_tokens(factors, ctx.groups.replica_ranks) for factors in factors_EMP])
        if len(x_MC):
            x_MC = all_gather_tokens(x_MC, ctx.groups.replica_ranks)
    if (table := deferring_table(ctx.table, factors_EMP.dtype, sparse=ctx.sparse)) is not None:
        defer_gradient(table, TableGradient(ids_MP, factors_EMP, x_MC, grad_y_MC))
        return None
    summed = cpu.sum_by_expert if _has_kernels(x_MC) else portable.sum_by_expert
    rows, grad_rows = summed(ids_MP, factors_EMP, x_MC, grad_y_MC)
    grad_rows = grad_rows.to(experts_NEC.dtype)
    if ctx.sparse:
        return sparse_gradient(rows, grad_rows, experts_NEC.shape)
    return grad_rows.new_zeros(experts_NEC.shape).index_copy_(0, rows, grad_rows)
