"""The sum of a token's retrieved experts by Triton's kernels; must match reference.py.

triton_tokens.py has the kernels that visit a token's experts, triton_segments.py those that sum by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from tinyexperts.ops.expert_mlp import triton_segments, triton_tokens
from tinyexperts.ops.expert_mlp.int4 import quantize_groups
from tinyexperts.ops.expert_mlp.int8 import quantize_vectors
from tinyexperts.ops.expert_mlp.portable import expert_mlp as portable_expert_mlp
from tinyexperts.ops.expert_mlp.sorted_pairs import places_of_rows, sort_pairs
from tinyexperts.ops.gpu.dispatch import BeyondLimits, GpuKernel
from tinyexperts.ops.gpu.launch import MAX_DIM, MAX_PAIRS, Launch, launch_for

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {torch.uint8: 4, torch.int8: 8, torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}

# Programs that keep a GPU busy: fewer tokens are split into several programs each.
_ENOUGH_PROGRAMS = 2048
# Pairs of a tile: more where there are many, since the parts of cut rows take memory for each tile.
_TILE, _LARGE_TILE, _MANY_PAIRS = 32, 128, 1 << 20
# Sizes of the operands of a check.
_CHECKED_TOKENS, _CHECKED_EXPERTS = 3, 50


@dataclass(frozen=True, kw_only=True)
class ExpertsPlan:
    """The constants of the kernels for a table and a number of retrieved experts."""

    x: torch.dtype
    table: torch.dtype
    weights: torch.dtype
    scales: torch.dtype | None
    num_vectors: int
    dim: int
    num_retrieved: int
    activation: str | None
    splits: int

    @property
    def launch(self) -> Launch:
        """The constants of the launch."""
        stored = (self.dim + 1) // 2 if self.table == torch.uint8 else self.dim
        columns = 2 if self.table == torch.uint8 else 1
        return launch_for(stored, num_vectors=self.num_vectors, columns_per_number=columns)

    def constants(self) -> dict[str, Any]:
        """Return the keyword arguments of both kernels."""
        launch = self.launch
        return {
            "P": self.num_retrieved,
            "E": self.num_vectors,
            "D": self.dim,
            "BITS": _BITS[self.table],
            "ACTIVATION": triton_tokens.ACTIVATION_CODES[self.activation],
            "BLOCK": launch.block,
            "ROWS": launch.rows,
            "num_warps": launch.warps,
        }


def _plan(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales: Tensor | None,
    sparse: bool = False,
) -> ExpertsPlan:
    dim = x_MD.shape[1]
    check_limits(dim, ids_MP.numel(), x_MD, weights_MP)
    if experts_NED.dtype not in _BITS:
        raise BeyondLimits(f"the table must be of fp32, bf16, fp16, int8 or 4 bits, got {experts_NED.dtype}")
    if scales is not None and scales.dtype not in FLOATS:
        raise BeyondLimits(f"scales must be fp32, bf16 or fp16, got {scales.dtype}")
    if not experts_NED.is_contiguous():
        raise BeyondLimits("the table must be contiguous")
    plan = ExpertsPlan(
        x=x_MD.dtype,
        table=experts_NED.dtype,
        weights=weights_MP.dtype,
        scales=None if scales is None else scales.dtype,
        num_vectors=experts_NED.shape[1],
        dim=dim,
        num_retrieved=ids_MP.shape[1],
        activation=activation,
        splits=1,
    )
    return _split(plan, len(x_MD))


def _split(plan: ExpertsPlan, num_tokens: int) -> ExpertsPlan:
    """Return the plan with as many programs a token as keep a GPU busy."""
    most = triton.cdiv(plan.num_retrieved, plan.launch.rows)
    return replace(plan, splits=max(1, min(most, _ENOUGH_PROGRAMS // max(1, num_tokens))))


def check_limits(dim: int, num_pairs: int, *operands: Tensor) -> None:
    """Check what all kernels of experts ask for.

    Raises:
        BeyondLimits: D outside of 1..MAX_DIM, too many pairs, or an operand of another type than fp32, bf16 or fp16.
    """
    if not 1 <= dim <= MAX_DIM:
        raise BeyondLimits(f"D must be between 1 and {MAX_DIM}, got {dim}")
    if num_pairs >= MAX_PAIRS:
        raise BeyondLimits(f"pairs of a token and an expert must be fewer than {MAX_PAIRS}, got {num_pairs}")
    for operand in operands:
        if operand.dtype not in FLOATS:
            raise BeyondLimits(f"operands must be fp32, bf16 or fp16, got {operand.dtype}")


def _expert_mlp(
    plan: ExpertsPlan,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales: Tensor | None,
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return y [M, D] and the pre-activations [E - 1, M, P] (fp32)."""
    pre = x_MD.new_empty((plan.num_vectors - 1, *ids_MP.shape), dtype=torch.float32)
    return _sum_experts(plan, x_MD, experts_NED, ids_MP, weights_MP, scales, pre), pre


def _sum_experts(
    plan: ExpertsPlan,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    scales: Tensor | None,
    pre: Tensor,
) -> Tensor:
    """Return y [M, D]. The kernel reads no x where E = 1, and writes pre-activations where E > 1."""
    num_tokens = len(ids_MP)
    if not ids_MP.numel():
        return experts_NED.new_zeros((num_tokens, plan.dim), dtype=plan.x)
    # Several programs of a token write its sums in fp32, to be added.
    dtype = plan.x if plan.splits == 1 else torch.float32
    y = experts_NED.new_empty((plan.splits, num_tokens, plan.dim), dtype=dtype)
    triton_tokens.forward[(num_tokens, plan.splits)](
        *(x_MD.contiguous(), experts_NED, x_MD if scales is None else scales.contiguous(), ids_MP.contiguous()),
        *(weights_MP.contiguous(), y, pre, num_tokens, len(experts_NED)),
        SPLITS=plan.splits,
        **plan.constants(),
    )
    return y[0] if plan.splits == 1 else y.sum(0).to(plan.x)


def _example(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales: Tensor | None,
    sparse: bool = False,
) -> tuple[Any, ...]:
    device, dim = x_MD.device, x_MD.shape[1]
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(_CHECKED_TOKENS, dim, generator=draw, device=device).to(x_MD.dtype)
    shape = (_CHECKED_EXPERTS, experts_NED.shape[1], dim)
    table, its_scales = torch.randn(shape, generator=draw, device=device) / dim**0.5, None
    if scales is not None:
        table, its_scales = (quantize_vectors if experts_NED.dtype == torch.int8 else quantize_groups)(table)
        its_scales = its_scales.to(scales.dtype)
    pairs = (_CHECKED_TOKENS, ids_MP.shape[1])
    ids = torch.randint(_CHECKED_EXPERTS, pairs, generator=draw, device=device)
    weights = torch.rand(pairs, generator=draw, device=device).to(weights_MP.dtype)
    return x, table.to(experts_NED.dtype), ids, weights, activation, its_scales, sparse


EXPERT_MLP = GpuKernel(plan=_plan, run=_expert_mlp, example=_example)
"""The forward pass."""


def _backward_plan(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    pre_activations_FMP: Tensor,
    activation: str | None,
    scales: Tensor | None,
) -> ExpertsPlan:
    check_limits(x_MD.shape[1], ids_MP.numel(), grad_y_MD)
    plan = _plan(x_MD, experts_NED, ids_MP, weights_MP, activation, scales)
    return replace(plan, splits=1)


def _expert_mlp_backward(
    plan: ExpertsPlan,
    grad_y_MD: Tensor,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    pre_activations_FMP: Tensor,
    activation: str | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and of the weights, and the factors [E, M, P] (fp32) of the table's gradient."""
    num_tokens = len(x_MD)
    grad_x, grad_weights = x_MD.new_empty(x_MD.shape), weights_MP.new_empty(weights_MP.shape)
    factors_EMP = x_MD.new_empty((plan.num_vectors, *ids_MP.shape), dtype=torch.float32)
    if not ids_MP.numel():
        return grad_x.zero_(), grad_weights, factors_EMP
    triton_tokens.backward[(num_tokens,)](
        *(grad_y_MD.contiguous(), experts_NED, x_MD if scales is None else scales.contiguous(), ids_MP.contiguous()),
        *(weights_MP.contiguous(), pre_activations_FMP, grad_x, grad_weights, factors_EMP),
        *(num_tokens, len(experts_NED)),
        **plan.constants(),
    )
    return grad_x, grad_weights, factors_EMP


def _backward_example(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    pre_activations_FMP: Tensor,
    activation: str | None,
    scales: Tensor | None,
) -> tuple[Any, ...]:
    x, table, ids, weights, *rest = _example(x_MD, experts_NED, ids_MP, weights_MP, activation, scales)
    _, pre = portable_expert_mlp(x, table, ids, weights, activation, rest[1], False)
    return x.flip(0).to(grad_y_MD.dtype), x, table, ids, weights, pre.contiguous(), activation, rest[1]


EXPERT_MLP_BACKWARD = GpuKernel(plan=_backward_plan, run=_expert_mlp_backward, example=_backward_example)
"""The backward pass up to the factors of the table's gradient."""


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
        tile=_TILE if ids_MP.numel() < _MANY_PAIRS else _LARGE_TILE,
        mode=mode,
    )


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


def weighted_sum(table_RD: Tensor, rows_MP: Tensor, factors_MP: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over p of factors[m, p] * table[rows[m, p]], [M, D], in a type."""
    plan = ExpertsPlan(
        x=dtype,
        table=table_RD.dtype,
        weights=factors_MP.dtype,
        scales=None,
        num_vectors=1,
        dim=table_RD.shape[1],
        num_retrieved=rows_MP.shape[1],
        activation=None,
        splits=1,
    )
    return _sum_experts(
        _split(plan, len(rows_MP)), table_RD, table_RD.contiguous().unsqueeze(1), rows_MP, factors_MP, None, factors_MP
    )


def sum_by_row(rows_MP: Tensor, factors_MP: Tensor, operand_MD: Tensor, num_rows: int) -> Tensor:
    """Return for each of R rows the sum of factors[m, p] * operand[m] over its pairs, [R, D] (fp32)."""
    out = operand_MD.new_zeros((num_rows, operand_MD.shape[1]), dtype=torch.float32)
    factors_EMP, table = factors_MP.unsqueeze(0), out.unsqueeze(1)
    plan = plan_sums(rows_MP, factors_EMP, operand_MD, operand_MD, table, triton_segments.DENSE)
    experts, order = sort_pairs(rows_MP)
    sum_by_expert(plan, experts, order, experts, factors_EMP, operand_MD, operand_MD, table, (table, table))
    return out
