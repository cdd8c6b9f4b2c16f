"""Adam on the touched rows of a table by a Triton kernel; must match reference.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyexperts.ops.gpu.dispatch import BeyondLimits, GpuKernel
from tinyexperts.ops.gpu.launch import MAX_DIM, launch_for
from tinyexperts.ops.gpu.limits import FLOATS
from tinyexperts.ops.row_adam.portable import bias_corrected_rate
from tinyexperts.ops.row_adam.rounding import rounding_key, signed
from tinyexperts.ops.row_adam.triton_update import update_rows

_MAX_VECTORS = 65535
_CHECKED_ROWS, _CHECKED_EXPERTS = 5, 50


class StepOptions(NamedTuple):
    """The options of a step, in the operator's order; torch leaves out the last one where it is None."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    rounding_seed: int | None = None

    @property
    def is_stochastic(self) -> bool:
        """True if values are rounded at random."""
        return self.rounding_seed is not None


@dataclass(frozen=True, kw_only=True)
class RowsPlan:
    """The constants of the kernel."""

    dtypes: tuple[torch.dtype, ...]
    num_vectors: int
    dim: int
    one_a_vector: bool
    stochastic: bool


def adam_constants(options: StepOptions) -> tuple[float, float, float, float, float, int]:
    """Return the constants of a step as `update_vector` takes them, the last one the key of its rounding."""
    rate = bias_corrected_rate(options.learning_rate, options.beta1, options.beta2, options.step)
    # As int32: Triton would take a number of 32 bits for an int64, and compile for some keys again.
    key = 0 if options.rounding_seed is None else signed(rounding_key(options.rounding_seed))
    keep = 1 - options.learning_rate * options.weight_decay
    return 1 - options.beta1, 1 - options.beta2, rate, options.eps, keep, key


def _plan(
    experts: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rows: Tensor, grad_rows: Tensor, *options: Any
) -> RowsPlan:
    one_a_vector = exp_avg_sq.dim() < experts.dim()
    dim = experts.shape[-1] if experts.dim() > 1 else 1
    num_vectors = math.prod(experts.shape[1:-1])
    if not 1 <= dim <= MAX_DIM:
        raise BeyondLimits(f"the last dimension must be between 1 and {MAX_DIM}, got {dim}")
    if not 1 <= num_vectors <= _MAX_VECTORS:
        raise BeyondLimits(f"a row must have between 1 and {_MAX_VECTORS} vectors, got {num_vectors}")
    tables = (experts, exp_avg, exp_avg_sq)
    dtypes = tuple(t.dtype for t in (*tables, grad_rows))
    if not set(dtypes) <= set(FLOATS):
        raise BeyondLimits(f"tables, moments and gradients must be fp32, bf16 or fp16, got {dtypes}")
    if not all(table.is_contiguous() for table in tables):
        raise BeyondLimits("the table and its moments must be contiguous")
    stochastic = StepOptions(*options).is_stochastic
    return RowsPlan(dtypes=dtypes, num_vectors=num_vectors, dim=dim, one_a_vector=one_a_vector, stochastic=stochastic)


def _row_adam_(
    plan: RowsPlan,
    experts: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    *options: Any,
) -> None:
    """Update experts, exp_avg and exp_avg_sq in place at `rows`; arguments as in tinyexperts.ops.row_adam_."""
    if not len(rows):
        return
    launch = launch_for(plan.dim)
    update_rows[(len(rows), plan.num_vectors)](
        *(experts, exp_avg, exp_avg_sq, rows.contiguous(), grad_rows.contiguous(), len(experts)),
        *adam_constants(StepOptions(*options)),
        V=plan.num_vectors,
        D=plan.dim,
        BLOCK=launch.block,
        ONE_A_VECTOR=plan.one_a_vector,
        STOCHASTIC=plan.stochastic,
        num_warps=launch.warps,
    )


def example_tables(*tables: Tensor) -> list[Tensor]:
    """Return a table and its two moments, small and of the kinds of given ones."""
    draw = torch.Generator(tables[0].device).manual_seed(0)
    shapes = [(_CHECKED_EXPERTS, *each.shape[1:]) for each in tables]
    numbers = [
        torch.randn(shape, generator=draw, device=each.device) for shape, each in zip(shapes, tables, strict=True)
    ]
    numbers[2].square_()
    return [each.to(like.dtype) for each, like in zip(numbers, tables, strict=True)]


def example_options(options: StepOptions) -> StepOptions:
    """Return options of a step that rounds as one of given options."""
    return StepOptions(0.01, 0.9, 0.99, 1e-8, 0.1, 3, 1 if options.is_stochastic else None)


def _example(
    experts: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rows: Tensor, grad_rows: Tensor, *options: Any
) -> tuple[Any, ...]:
    tables = example_tables(experts, exp_avg, exp_avg_sq)
    chosen = torch.arange(_CHECKED_EXPERTS - _CHECKED_ROWS, _CHECKED_EXPERTS, device=rows.device).flip(0)
    gradients = tables[0][:_CHECKED_ROWS].to(grad_rows.dtype)
    return *tables, chosen, gradients, *example_options(StepOptions(*options))


ROW_ADAM = GpuKernel(plan=_plan, run=_row_adam_, example=_example, num_changed=3)
"""The update of given rows."""
