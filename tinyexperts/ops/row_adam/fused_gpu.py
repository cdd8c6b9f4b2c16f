"""Adam on the touched rows straight from a gradient in deferred form, by Triton's kernels that sum by expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinyexperts.ops.expert_mlp.gpu_sums import SumsPlan, plan_sums, sorted_example, sum_by_expert
from tinyexperts.ops.expert_mlp.triton_segments import ADAM
from tinyexperts.ops.gpu.dispatch import BeyondLimits, GpuKernel
from tinyexperts.ops.gpu.limits import FLOATS
from tinyexperts.ops.row_adam.gpu import StepOptions, adam_constants, example_options, example_tables


@dataclass(frozen=True, kw_only=True)
class FusedPlan:
    """The constants of the kernels, and the types of the moments."""

    sums: SumsPlan
    moments: tuple[torch.dtype, torch.dtype]


def _plan(
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sorted_experts: Tensor,
    order: Tensor,
    factors_EMP: Tensor,
    x_MD: Tensor,
    grad_y_MD: Tensor,
    *options: Any,
) -> FusedPlan:
    tables = (experts, exp_avg, exp_avg_sq)
    if not all(table.is_contiguous() and table.dtype in FLOATS for table in tables):
        raise BeyondLimits("the table and its moments must be contiguous, and of fp32, bf16 or fp16")
    sums = plan_sums(order, factors_EMP, x_MD, grad_y_MD, experts, ADAM)
    one_a_vector, stochastic = exp_avg_sq.dim() < experts.dim(), StepOptions(*options).is_stochastic
    sums = replace(sums, one_a_vector=one_a_vector, stochastic=stochastic)
    return FusedPlan(sums=sums, moments=(exp_avg.dtype, exp_avg_sq.dtype))


def _row_adam_fused_(
    plan: FusedPlan,
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sorted_experts: Tensor,
    order: Tensor,
    factors_EMP: Tensor,
    x_MD: Tensor,
    grad_y_MD: Tensor,
    *options: Any,
) -> None:
    """Update the touched rows of the table and of its moments in place, in a step of `tinyexperts.ops.row_adam_`."""
    sum_by_expert(
        *(plan.sums, sorted_experts, order, sorted_experts, factors_EMP, x_MD, grad_y_MD, experts),
        (exp_avg, exp_avg_sq),
        adam_constants(StepOptions(*options)),
    )


def _example(
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sorted_experts: Tensor,
    order: Tensor,
    *operands: Any,
) -> tuple[Any, ...]:
    tables = example_tables(experts, exp_avg, exp_avg_sq)
    return *tables, *sorted_example(*operands[:3]), *example_options(StepOptions(*operands[3:]))


ROW_ADAM_FUSED = GpuKernel(plan=_plan, run=_row_adam_fused_, example=_example, num_changed=3)
"""The update of the rows that a backward pass touched."""
