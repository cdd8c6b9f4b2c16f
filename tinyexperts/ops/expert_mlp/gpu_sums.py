"""What is summed by expert, by Triton's kernels (triton_segments.py): the table's gradient, and its squared norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tinyexperts.ops.expert_mlp import triton_segments
from tinyexperts.ops.expert_mlp.sorted_pairs import places_of_rows, sort_pairs
from tinyexperts.ops.gpu.dispatch import BeyondLimits, GpuKernel
from tinyexperts.ops.gpu.launch import launch_for
from tinyexperts.ops.gpu.limits import check_limits

# Pairs of a tile: more where there are many, since the parts of cut rows take memory for each tile.
_TILE, _LARGE_TILE, _MANY_PAIRS = 32, 128, 1 << 20
# Sizes of the operands of a check.
_CHECKED_TOKENS, _CHECKED_EXPERTS = 3, 50


@dataclass(frozen=True, kw_only=True)
class SumsPlan:
    """The constants of the kernels that sum by expert."""

    x: torch.dtype
    grad_y: torch.dtype
    table: torch.dtype
    num_vectors: int
    dim: int
    tile: int
    mode: int
    one_a_vector: bool = False
    stochastic: bool = False


def plan_sums(
    ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor, mode: int
) -> SumsPlan:
    """Return the plan of sums by expert.

    Raises:
        BeyondLimits: operands that the kernels don't take.
    """
    check_limits(grad_y_MD.shape[1], ids_MP.numel(), x_MD, grad_y_MD, experts_NED)
    if factors_EMP.dtype != torch.float32:
        raise BeyondLimits(f"factors must be fp32, got {factors_EMP.dtype}")
    if len(experts_NED) >= 2**31:
        raise BeyondLimits(f"a table must have fewer than {2**31} experts, got {len(experts_NED)}")
    return SumsPlan(
        x=x_MD.dtype,
        grad_y=grad_y_MD.dtype,
        table=experts_NED.dtype,
        num_vectors=len(factors_EMP),
        dim=grad_y_MD.shape[1],
        tile=_tile_for(ids_MP.numel()),
        mode=mode,
    )


def _tile_for(num_pairs: int) -> int:
    return _TILE if num_pairs < _MANY_PAIRS else _LARGE_TILE


def sum_by_expert(
    plan: SumsPlan,
    experts: Tensor,
    order: Tensor,
    places: Tensor,
    factors_EMP: Tensor,
    x_MD: Tensor,
    grad_y_MD: Tensor,
    out: Tensor,
    moments: tuple[Tensor, Tensor],
    constants: tuple[float, float, float, float, float, int] = (0.0, 0.0, 0.0, 0.0, 0.0, 0),
) -> None:
    """Launch both kernels of triton_segments.py.

    Args:
        plan (SumsPlan): the constants, and what the sums are for.
        experts (int32, [M*P]), order (int64, [M*P]): the pairs as `sort_pairs` sorts them.
        places (int32, [M*P]): `places_of_rows`, which only the mode ROWS reads.
        factors_EMP (fp32, [E, M, P]): the factors of the table's gradient.
        x_MD, grad_y_MD (float, [M, D]): what they multiply.
        out (float): the table [N, E, D], the touched rows [R, E, D], or the sums of squares [tiles, 2] (fp32).
        moments (tuple): Adam's moments; any other tensors where the plan is for something else.
        constants (tuple): Adam's constants, as `update_vector` takes them.
    """
    num_vectors, num_tokens, num_retrieved = factors_EMP.shape
    num_pairs = num_tokens * num_retrieved
    if not num_pairs:
        return
    launch = launch_for(plan.dim)
    shared = {
        "E": num_vectors,
        "D": plan.dim,
        "BLOCK": launch.block,
        "TILE": plan.tile,
        "MODE": plan.mode,
        "ONE_A_VECTOR": plan.one_a_vector,
        "STOCHASTIC": plan.stochastic,
        "num_warps": launch.warps,
    }
    num_tiles = triton.cdiv(num_pairs, plan.tile)
    parts = x_MD.new_empty((num_tiles, 2, num_vectors, plan.dim), dtype=torch.float32)
    triton_segments.sum_tiles[(num_tiles,)](
        *(experts, order, places, factors_EMP.contiguous(), x_MD.contiguous(), grad_y_MD.contiguous()),
        *(parts, out, *moments, num_pairs, num_retrieved, *constants),
        **shared,
    )
    triton_segments.add_parts[(num_tiles,)](experts, places, parts, out, *moments, num_pairs, *constants, **shared)


def _rows_plan(ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor) -> SumsPlan:
    return plan_sums(ids_MP, factors_EMP, x_MD, grad_y_MD, experts_NED, triton_segments.ROWS)


def _gradient_rows(
    plan: SumsPlan, ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the touched rows [R], ascending, and their gradients [R, E, D], in the table's type."""
    experts, order = sort_pairs(ids_MP)
    places = places_of_rows(experts)
    num_rows = int(places[-1]) + 1 if len(places) else 0  # waits for the device, since shapes depend on it
    out = experts_NED.new_empty((num_rows, len(factors_EMP), plan.dim))
    sum_by_expert(plan, experts, order, places, factors_EMP, x_MD, grad_y_MD, out, (out, out))
    rows = ids_MP.new_empty(num_rows).scatter_(0, places.long(), experts.long())
    return rows, out


def _sums_example(
    ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor
) -> tuple[Any, ...]:
    device, dim = grad_y_MD.device, grad_y_MD.shape[1]
    draw = torch.Generator(device).manual_seed(0)
    # Some experts of many pairs, and some rows that begin in one tile and end in another.
    pairs = (_CHECKED_TOKENS, _CHECKED_EXPERTS)
    ids = (torch.rand(pairs, generator=draw, device=device) ** 3 * _CHECKED_EXPERTS).long()
    factors = torch.randn(len(factors_EMP), *pairs, generator=draw, device=device)
    x, grad_y = (
        torch.randn(_CHECKED_TOKENS, dim, generator=draw, device=device).to(t.dtype) for t in (x_MD, grad_y_MD)
    )
    table = torch.empty((_CHECKED_EXPERTS, len(factors), dim), dtype=experts_NED.dtype, device=device)
    return ids, factors, x, grad_y, table


GRADIENT_ROWS = GpuKernel(plan=_rows_plan, run=_gradient_rows, example=_sums_example)
"""The gradient of the touched rows."""


def _dense_plan(ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor) -> SumsPlan:
    return plan_sums(ids_MP, factors_EMP, x_MD, grad_y_MD, experts_NED, triton_segments.DENSE)


def _dense_gradient(
    plan: SumsPlan, ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor
) -> Tensor:
    """Return the gradient of the whole table [N, E, D], in its type; nothing waits for the device."""
    out = torch.zeros_like(experts_NED, memory_format=torch.contiguous_format)
    experts, order = sort_pairs(ids_MP)
    sum_by_expert(plan, experts, order, experts, factors_EMP, x_MD, grad_y_MD, out, (out, out))
    return out


DENSE_GRADIENT = GpuKernel(plan=_dense_plan, run=_dense_gradient, example=_sums_example)
"""The gradient of the whole table."""


def _norm_plan(experts: Tensor, order: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor) -> SumsPlan:
    return plan_sums(order, factors_EMP, x_MD, grad_y_MD, grad_y_MD, triton_segments.NORM)


def _squared_norm(
    plan: SumsPlan, experts: Tensor, order: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor
) -> Tensor:
    """Return squares (fp32, [tiles, 2]) whose sum is that of the gradient's squares."""
    squares = factors_EMP.new_empty((triton.cdiv(len(order), plan.tile), 2))
    moments = squares, squares
    sum_by_expert(plan, experts, order, experts, factors_EMP, x_MD, grad_y_MD, squares, moments)
    return squares


def sorted_example(factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor) -> tuple[Tensor, ...]:
    """Return small sorted pairs, factors, tokens and gradients of the kinds of given ones."""
    ids, *rest, _ = _sums_example(factors_EMP, factors_EMP, x_MD, grad_y_MD, factors_EMP)
    return *sort_pairs(ids), *rest


SQUARED_NORM = GpuKernel(
    plan=_norm_plan,
    run=_squared_norm,
    example=lambda experts, order, *operands: sorted_example(*operands),
    compared=torch.sum,
)
"""The sum of the gradient's squares."""


def plan_sum_by_row(num_pairs: int, dim: int, operand: torch.dtype) -> SumsPlan:
    """Return the plan of `sum_by_row` for sizes and the operand's type.

    Raises:
        BeyondLimits: sizes that the kernels don't take.
    """
    check_limits(dim, num_pairs)
    return SumsPlan(
        x=operand,
        grad_y=operand,
        table=torch.float32,
        num_vectors=1,
        dim=dim,
        tile=_tile_for(num_pairs),
        mode=triton_segments.DENSE,
    )


def sum_by_row(plan: SumsPlan, rows_MP: Tensor, factors_MP: Tensor, operand_MD: Tensor, num_rows: int) -> Tensor:
    """Return for each of R rows the sum of factors[m, p] * operand[m] over its pairs, [R, D] (fp32)."""
    out = operand_MD.new_zeros((num_rows, plan.dim), dtype=torch.float32)
    factors_EMP, table = factors_MP.unsqueeze(0), out.unsqueeze(1)
    experts, order = sort_pairs(rows_MP)
    sum_by_expert(plan, experts, order, experts, factors_EMP, operand_MD, operand_MD, table, (table, table))
    return out
