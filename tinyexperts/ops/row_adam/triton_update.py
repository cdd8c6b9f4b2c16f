"""Triton's kernels of Adam on the touched rows of a table; they must match reference.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tinyexperts.ops.row_adam.rounding import HIGH_MULTIPLIER, INFINITY, MULTIPLIERS

_FIRST = tl.constexpr(MULTIPLIERS[0])
_SECOND = tl.constexpr(MULTIPLIERS[1])
_HIGH = tl.constexpr(HIGH_MULTIPLIER)
_INFINITY = tl.constexpr(INFINITY)


@triton.jit
def round_at_random(value: tl.tensor, element: tl.tensor, key: tl.tensor) -> tl.tensor:
    """Return fp32 values in bf16, rounded as in rounding.py: `element` (int64) is their place, `key` is int32."""
    number = element.to(tl.uint32) ^ ((element >> 32).to(tl.uint32) * _HIGH) ^ key.to(tl.uint32)
    number = (number ^ (number >> 16)) * _FIRST
    number = (number ^ (number >> 15)) * _SECOND
    bits = value.to(tl.uint32, bitcast=True)
    moved = bits + ((number ^ (number >> 16)) & 0xFFFF)
    is_special = ((bits & _INFINITY) == _INFINITY) | ((moved & _INFINITY) == _INFINITY)
    upper = tl.where(is_special, bits, moved) >> 16
    upper = tl.where(value != value, upper | 0x40, upper)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def update_vector(
    table_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    element: tl.tensor,
    vector: tl.tensor,
    grad: tl.tensor,
    inside: tl.tensor,
    gain_1: tl.tensor,
    gain_2: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    keep: tl.tensor,
    key: tl.tensor,
    D: tl.constexpr,
    ONE_A_VECTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Update the elements of one vector, and both of its moments, by its gradient (fp32).

    Args:
        element: the places of the vector's elements in the table and in the first moment, [BLOCK].
        vector: the place of the vector among all vectors, for a second moment of one number a vector.
        gain_1, gain_2: 1 - beta1 and 1 - beta2.
        rate: the learning rate times both bias corrections.
        keep: what weight decay leaves of a value.
        key: the key of `round_at_random`, by which the values of a bf16 table are rounded where STOCHASTIC.
    """
    value = tl.load(table_ptr + element, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(first_ptr + element, mask=inside, other=0.0).to(tl.float32)
    if ONE_A_VECTOR:
        squares = tl.sum(tl.where(inside, grad * grad, 0.0), 0) / D
        second = tl.load(second_ptr + vector).to(tl.float32)
        second += gain_2 * (squares - second)
        tl.store(second_ptr + vector, second.to(second_ptr.dtype.element_ty))
    else:
        second = tl.load(second_ptr + element, mask=inside, other=0.0).to(tl.float32)
        second += gain_2 * (grad * grad - second)
        tl.store(second_ptr + element, second.to(second_ptr.dtype.element_ty), mask=inside)
    first += gain_1 * (grad - first)
    tl.store(first_ptr + element, first.to(first_ptr.dtype.element_ty), mask=inside)
    value = keep * value - rate * (first / (tl.sqrt(second) + eps))
    if STOCHASTIC:
        tl.store(table_ptr + element, round_at_random(value, element, key), mask=inside)
    else:
        tl.store(table_ptr + element, value.to(table_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "key"])
def update_rows(
    table_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    num_rows: tl.tensor,
    gain_1: tl.tensor,
    gain_2: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    keep: tl.tensor,
    key: tl.tensor,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_A_VECTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Update a vector of a touched row: tables [N, V, D], rows [R] (int64), gradients [R, V, D]."""
    place = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1)
    row = tl.load(rows_ptr + place)
    tl.device_assert((row >= 0) & (row < num_rows), "rows must be between 0 and N - 1")
    d = tl.arange(0, BLOCK)
    inside = d < D
    grad = tl.load(grad_ptr + (place * V + v) * D + d, mask=inside, other=0.0).to(tl.float32)
    vector = row * V + v
    update_vector(
        *(table_ptr, first_ptr, second_ptr, vector * D + d, vector, grad, inside),
        *(gain_1, gain_2, rate, eps, keep, key, D, ONE_A_VECTOR, STOCHASTIC),
    )
