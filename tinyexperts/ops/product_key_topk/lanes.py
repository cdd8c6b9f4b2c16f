"""What the top-k kernel does with many scores at once, as vectors of LLVM's, which any processor's unit can take.

Written as loops, half of this work would stay scalar: the compiler unrolls by 32 what is often shorter than that.
Arrays are C-contiguous; the functions are for exact kernels only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

# Columns whose maxima are found at once, values that are ranked at once, and scores that one mask stands for.
COLUMN_LANES = 32
RANK_LANES = 16
MASK_LANES = 64

_alloca_once_value: Callable[[Any, Any], Any] = cast(Any, cgutils.alloca_once_value)


def _vector_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any, lanes: int) -> tuple[Any, int]:
    """A pointer to `lanes` elements from a flat index on, and the alignment of an element."""
    element = context.get_value_type(array_type.dtype)
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.bitcast(builder.gep(data, [index]), ir.PointerType(ir.VectorType(element, lanes)))
    return pointer, array_type.dtype.bitwidth // 8


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    int32 = ir.IntType(32)
    vector = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, int32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(int32, lanes), [0] * lanes))


@intrinsic
def _maxima_of_columns(typing_context: Any, scores: Any, first: Any, stop: Any, width: Any, maxima: Any, column: Any):  # type: ignore[no-untyped-def]
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, first, stop, width, maxima, column = arguments
        pointer, alignment = _vector_at(context, builder, signature.args[0], scores, first, COLUMN_LANES)
        largest = _alloca_once_value(builder, builder.load(pointer, align=alignment))
        with cgutils.for_range_slice(builder, builder.add(first, width), stop, width, first.type) as (index, _):
            pointer, _ = _vector_at(context, builder, signature.args[0], scores, index, COLUMN_LANES)
            row, before = builder.load(pointer, align=alignment), builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", row, before), row, before), largest)
        pointer, _ = _vector_at(context, builder, signature.args[4], maxima, column, COLUMN_LANES)
        builder.store(builder.load(largest), pointer, align=alignment)
        return context.get_dummy_value()

    return types.void(scores, types.intp, types.intp, types.intp, maxima, types.intp), code


# maxima[column + lane] = the largest of scores[first + lane], scores[first + width + lane] and so on to `stop`.
maxima_of_columns: Callable[[Any, int, int, int, Any, int], None] = cast(Any, _maxima_of_columns)


@intrinsic
def _count_larger(typing_context: Any, values: Any, num_values: Any, first: Any, counts: Any):  # type: ignore[no-untyped-def]
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, num_values, first, counts = arguments
        pointer, alignment = _vector_at(context, builder, signature.args[0], values, first, RANK_LANES)
        lanes = builder.load(pointer, align=alignment)
        # As wide as the values, so that a comparison's mask is a number to subtract.
        counter = ir.VectorType(ir.IntType(8 * alignment), RANK_LANES)
        total = _alloca_once_value(builder, ir.Constant(counter, [0] * RANK_LANES))
        with cgutils.for_range(builder, num_values) as loop:
            pointer, _ = _vector_at(context, builder, signature.args[0], values, loop.index, 1)
            value = builder.load(builder.bitcast(pointer, ir.PointerType(lanes.type.element)), align=alignment)
            larger = builder.fcmp_ordered(">", _splat(builder, value, RANK_LANES), lanes)
            builder.store(builder.sub(builder.load(total), builder.sext(larger, counter)), total)
        result = builder.load(total)
        if alignment == 8:
            result = builder.trunc(result, ir.VectorType(ir.IntType(32), RANK_LANES))
        pointer, alignment = _vector_at(context, builder, signature.args[3], counts, first, RANK_LANES)
        builder.store(result, pointer, align=alignment)
        return context.get_dummy_value()

    return types.void(values, types.intp, types.intp, counts), code


# counts[first + lane] = how many of the first `num_values` values exceed values[first + lane].
count_larger: Callable[[Any, int, int, Any], None] = cast(Any, _count_larger)


@intrinsic
def _mask_of_reaching(typing_context: Any, scores: Any, first: Any, threshold: Any):  # type: ignore[no-untyped-def]
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, first, threshold = arguments
        pointer, alignment = _vector_at(context, builder, signature.args[0], scores, first, MASK_LANES)
        row = builder.load(pointer, align=alignment)
        reaching = builder.fcmp_unordered(">=", row, _splat(builder, threshold, MASK_LANES))
        return builder.bitcast(reaching, ir.IntType(MASK_LANES))

    return types.uint64(scores, types.intp, scores.dtype), code


# Bit `lane` tells that scores[first + lane] is at least the threshold, or NaN.
mask_of_reaching: Callable[[Any, int, Any], Any] = cast(Any, _mask_of_reaching)


@intrinsic
def _lowest_bit(typing_context: Any, mask: Any):  # type: ignore[no-untyped-def]
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uintp(types.uint64), code


# The number of the lowest bit that is set; 64 where none is.
lowest_bit: Callable[[Any], int] = cast(Any, _lowest_bit)
