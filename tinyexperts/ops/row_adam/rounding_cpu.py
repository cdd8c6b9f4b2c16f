"""A table's elements as the CPU's kernels of a step read and write them.

bf16 is rounded at random as in rounding.py, to the bit, or to nearest.

The code is that of one element: the compiler makes lanes of it with the loop around it. It is written in LLVM's words
because numba computes with uint32 in 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

from tinyexperts.ops.row_adam.rounding import HIGH_MULTIPLIER, INFINITY, MULTIPLIERS, rounding_key

_BITS, _HALF = ir.IntType(32), ir.IntType(16)
_SIGN_AND_REST = 0x7FFFFFFF


def key_of(seed: int | None) -> Any:
    """Return the key as kernels take it; None, for which they round to nearest, without a seed."""
    return None if seed is None else np.uint32(rounding_key(seed))


@intrinsic
def _widened(typing_context: Any, element: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if signature.args[0] != types.uint16:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, _BITS), _BITS(16)), ir.FloatType())

    return (types.float32 if element == types.uint16 else element)(element), code


@intrinsic
def _narrowed(typing_context: Any, table: Any, value: Any, start: Any, d: Any, key: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, number, start_value, d_value, key_value = arguments
        if signature.args[0].dtype != types.uint16:
            return number
        bits = builder.bitcast(number, _BITS)
        is_nearest = isinstance(signature.args[4], types.NoneType)
        moved = _to_nearest(builder, bits) if is_nearest else _at_random(builder, bits, start_value, d_value, key_value)
        upper = builder.lshr(moved, _BITS(16))
        rest = builder.and_(bits, _BITS(_SIGN_AND_REST))
        is_nan = builder.icmp_unsigned(">", rest, _BITS(INFINITY))
        # A NaN whose bits are all in the lower half would become an infinity.
        nan = builder.or_(builder.lshr(bits, _BITS(16)), _BITS(0x40))
        return builder.trunc(builder.select(is_nan, nan, upper), _HALF)

    return table.dtype(table, value, types.int64, types.int64, key), code


def _to_nearest(builder: Any, bits: Any) -> Any:
    """Return the bits with a half of the last place added, a little less where that place is even."""
    is_odd = builder.and_(builder.lshr(bits, _BITS(16)), _BITS(1))
    return builder.add(bits, builder.add(is_odd, _BITS(0x7FFF)))


def _at_random(builder: Any, bits: Any, start: Any, d: Any, key: Any) -> Any:
    """Return the bits with random ones added, unless they are, or would be, an infinity or NaN."""
    moved = builder.add(bits, _random_bits(builder, start, d, key))
    is_special = [
        builder.icmp_unsigned("==", builder.and_(each, _BITS(INFINITY)), _BITS(INFINITY)) for each in (bits, moved)
    ]
    return builder.select(builder.or_(*is_special), bits, moved)


def _random_bits(builder: Any, start: Any, d: Any, key: Any) -> Any:
    """Return 16 random bits of the element start + d (64 bits each, and d is less than 2^32)."""

    def fold(number: Any, count: int) -> Any:
        return builder.xor(number, builder.lshr(number, _BITS(count)))

    # In lanes of 64 bits the loop would take half as many of them: all that depends on d has 32 bits.
    first = builder.trunc(start, _BITS)
    low = builder.add(first, builder.trunc(d, _BITS))
    high = builder.trunc(builder.lshr(start, start.type(32)), _BITS)
    key_here, key_behind = (
        builder.xor(builder.mul(each, _BITS(HIGH_MULTIPLIER)), key) for each in (high, builder.add(high, _BITS(1)))
    )
    key = builder.select(builder.icmp_unsigned("<", low, first), key_behind, key_here)
    number = builder.xor(low, key)
    number = builder.mul(fold(number, 16), _BITS(MULTIPLIERS[0]))
    number = builder.mul(fold(number, 15), _BITS(MULTIPLIERS[1]))
    return builder.and_(fold(number, 16), _BITS(0xFFFF))


# widened(element): its number; that of bf16, which is stored as uint16, in fp32. For kernels only.
widened: Callable[[Any], Any] = cast(Any, _widened)
# narrowed(table, value, start, d, key): what the table stores for a value at the place start + d, of a bf16 table
# rounded, with a key (uint32) at random and with None to nearest. Of a loop over d, start does not change.
narrowed: Callable[[Any, Any, Any, Any, Any], Any] = cast(Any, _narrowed)
