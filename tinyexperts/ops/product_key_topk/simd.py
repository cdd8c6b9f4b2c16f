"""The top-k kernel's operations on many scores at once; arrays are C-contiguous, indices flat. For kernels only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from tinyexperts.ops.cpu.simd import array_data, constant, load, splat, store, variable

# Columns whose maxima are found at once, values that are ranked at once, and scores in one mask.
COLUMN_LANES = 32
RANK_LANES = 16
MASK_LANES = 64


@intrinsic
def _maxima_of_columns(
    typing_context: Any, scores: Any, first: Any, stop: Any, width: Any, maxima: Any, column: Any
) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, first, stop, width, maxima, column = arguments
        data = array_data(context, builder, signature.args[0], scores)
        # A column is every width-th score; 32 of them stay in registers while the row goes by.
        largest = variable(builder, load(builder, data, first, COLUMN_LANES))
        with cgutils.for_range_slice(builder, builder.add(first, width), stop, width, first.type) as (index, _):
            row, before = load(builder, data, index, COLUMN_LANES), builder.load(largest)
            # Every comparison with NaN is false here; the mask of those that reach the threshold finds NaN.
            builder.store(builder.select(builder.fcmp_ordered(">", row, before), row, before), largest)
        store(builder, builder.load(largest), array_data(context, builder, signature.args[4], maxima), column)
        return context.get_dummy_value()

    return types.void(scores, types.intp, types.intp, types.intp, maxima, types.intp), code


# maxima[column + lane] = the largest of scores[first + lane], scores[first + width + lane] and so on to `stop`.
maxima_of_columns: Callable[[Any, int, int, int, Any, int], None] = cast(Any, _maxima_of_columns)


@intrinsic
def _count_larger(typing_context: Any, values: Any, num_values: Any, first: Any, counts: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, num_values, first, counts = arguments
        data = array_data(context, builder, signature.args[0], values)
        lanes = load(builder, data, first, RANK_LANES)
        # As wide as the values, so that a comparison's mask is a number to subtract.
        zeros = constant(ir.IntType(signature.args[0].dtype.bitwidth), RANK_LANES, 0)
        count = variable(builder, zeros)
        # Every value against 16 at a time; a true comparison is -1.
        with cgutils.for_range(builder, num_values) as loop:
            value = splat(builder, builder.load(builder.gep(data, [loop.index])), RANK_LANES)
            larger = builder.sext(builder.fcmp_ordered(">", value, lanes), zeros.type)
            builder.store(builder.sub(builder.load(count), larger), count)
        out = array_data(context, builder, signature.args[3], counts)
        counted = builder.load(count)
        if zeros.type.element != out.type.pointee:
            counted = builder.trunc(counted, ir.VectorType(out.type.pointee, RANK_LANES))
        store(builder, counted, out, first)
        return context.get_dummy_value()

    return types.void(values, types.intp, types.intp, counts), code


# counts[first + lane], in int32, = how many of the first `num_values` values exceed values[first + lane].
count_larger: Callable[[Any, int, int, Any], None] = cast(Any, _count_larger)


@intrinsic
def _mask_of_reaching(typing_context: Any, scores: Any, first: Any, threshold: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, first, threshold = arguments
        row = load(builder, array_data(context, builder, signature.args[0], scores), first, MASK_LANES)
        # One bit a lane. "Unordered" is true for NaN, which must be found to be settled.
        reaching = builder.fcmp_unordered(">=", row, splat(builder, threshold, MASK_LANES))
        return builder.bitcast(reaching, ir.IntType(MASK_LANES))

    return types.uint64(scores, types.intp, scores.dtype), code


# Bit `lane` is set if scores[first + lane] is at least the threshold, or NaN.
mask_of_reaching: Callable[[Any, int, Any], Any] = cast(Any, _mask_of_reaching)


@intrinsic
def _lowest_bit(typing_context: Any, mask: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uintp(types.uint64), code


# The number of the lowest bit that is set; 64 where none is.
lowest_bit: Callable[[Any], int] = cast(Any, _lowest_bit)
