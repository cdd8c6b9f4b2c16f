"""The sum of a token's retrieved experts by Triton's kernels; must match reference.py.

triton_tokens.py has the kernels. gpu_sums.py makes the table's gradient of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from tinyexperts.ops.expert_mlp import triton_tokens
from tinyexperts.ops.expert_mlp.int4 import quantize_groups
from tinyexperts.ops.expert_mlp.int8 import quantize_vectors
from tinyexperts.ops.expert_mlp.portable import expert_mlp as portable_expert_mlp
from tinyexperts.ops.gpu.dispatch import BeyondLimits, GpuKernel
from tinyexperts.ops.gpu.launch import Launch, launch_for
from tinyexperts.ops.gpu.limits import FLOATS, check_limits

_BITS = {torch.uint8: 4, torch.int8: 8, torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}

# Programs that keep a GPU busy: fewer tokens are split into several programs each.
_ENOUGH_PROGRAMS = 2048
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
    """Return the plan with as many programs a token as keep a GPU busy: a power of two, so that few are compiled."""
    most = max(1, triton.cdiv(plan.num_retrieved, plan.launch.rows))
    enough = max(1, _ENOUGH_PROGRAMS // max(1, num_tokens))
    return replace(plan, splits=1 << (min(most, enough).bit_length() - 1))


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


def plan_weighted_sum(
    num_tokens: int, num_retrieved: int, dim: int, table: torch.dtype, out: torch.dtype
) -> ExpertsPlan:
    """Return the plan of `weighted_sum` for sizes, and for the types of the table and of the sums.

    Raises:
        BeyondLimits: sizes that the kernel doesn't take.
    """
    check_limits(dim, num_tokens * num_retrieved)
    plan = ExpertsPlan(
        x=out,
        table=table,
        weights=torch.float32,
        scales=None,
        num_vectors=1,
        dim=dim,
        num_retrieved=num_retrieved,
        activation=None,
        splits=1,
    )
    return _split(plan, num_tokens)


def weighted_sum(plan: ExpertsPlan, table_RD: Tensor, rows_MP: Tensor, factors_MP: Tensor) -> Tensor:
    """Return the sum over p of factors[m, p] (fp32) * table[rows[m, p]], [M, D], in the plan's type."""
    table_R1D = table_RD.contiguous().unsqueeze(1)
    return _sum_experts(plan, table_RD, table_R1D, rows_MP, factors_MP, None, factors_MP)
