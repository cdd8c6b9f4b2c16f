"""Operations of LLVM on several lanes at once for the CPU's kernels: any processor's SIMD unit takes them.

They are for inner loops whose code must not depend on what the compiler makes of a loop. It vectorizes some loops, and
unrolls them so far that short ones stay scalar, and it takes seconds to do so. LLVM's vectors are called "lanes" here,
since a vector is a part of an expert elsewhere.
"""

from __future__ import annotations

from typing import Any, cast

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

_INT32 = ir.IntType(32)


def array_data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Return a pointer to the first element of an array, which must be C-contiguous."""
    return context.make_array(array_type)(context, builder, array).data


def array_shape(context: Any, builder: Any, array_type: Any, array: Any) -> list[Any]:
    """Return the lengths of an array's dimensions."""
    lengths = context.make_array(array_type)(context, builder, array).shape
    return [builder.extract_value(lengths, axis) for axis in range(array_type.ndim)]


def variable(builder: Any, initial: Any) -> Any:
    """Return a pointer to a value that loops change; the compiler keeps it in registers."""
    return cast(Any, cgutils.alloca_once_value)(builder, initial)


def load(builder: Any, data: Any, index: Any, lanes: int) -> Any:
    """Return `lanes` elements from an index on."""
    return builder.load(_lanes_pointer(builder, data, index, lanes), align=_alignment(data.type.pointee))


def store(builder: Any, values: Any, data: Any, index: Any) -> None:
    """Write lanes from an index on."""
    pointer = _lanes_pointer(builder, data, index, values.type.count)
    builder.store(values, pointer, align=_alignment(data.type.pointee))


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Return the same number in all lanes."""
    type_ = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(type_, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes))


def constant(element_type: Any, lanes: int, value: Any) -> Any:
    """Return the same constant in all lanes."""
    return ir.Constant(ir.VectorType(element_type, lanes), [value] * lanes)


def total(builder: Any, values: Any) -> Any:
    """Return the sum of the lanes, whose number is a power of two."""
    while (half := values.type.count // 2) >= 1:
        low, high = (
            builder.shuffle_vector(values, values, ir.Constant(ir.VectorType(_INT32, half), list(lanes)))
            for lanes in (range(half), range(half, 2 * half))
        )
        values = builder.fadd(low, high)
    return builder.extract_element(values, _INT32(0))


def prefetch(builder: Any, pointer: Any) -> None:
    """Ask for the cache line of an address, into L2: into L1, rows would push each other out before they are used."""
    pointer = builder.bitcast(pointer, ir.PointerType(ir.IntType(8)))
    function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
    function = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), function_type)
    # A read, locality 2 (L2 on x86 and ARM), of data.
    builder.call(function, [pointer, _INT32(0), _INT32(2), _INT32(1)])


def widen(context: Any, builder: Any, values: Any, dtype: Any, number: Any) -> Any:
    """Return a table's elements exactly as numbers of LLVM's type `number`.

    `dtype` is numba's type of the table: uint16 holds bf16, and int16 holds fp16.
    """
    lanes = values.type.count
    singles, bits_type = ir.VectorType(ir.FloatType(), lanes), ir.VectorType(_INT32, lanes)
    if dtype == types.uint16:  # bf16 is the upper half of fp32
        bits = builder.zext(values, bits_type)
        values = builder.bitcast(builder.shl(bits, constant(_INT32, lanes, 16)), singles)
    elif dtype == types.int16 and _has_halves(context):
        values = builder.fpext(builder.bitcast(values, ir.VectorType(ir.HalfType(), lanes)), singles)
    elif dtype == types.int16:
        values = builder.bitcast(_bits_of_halves(builder, builder.sext(values, bits_type)), singles)
    elif dtype == types.int8:
        values = builder.sitofp(values, singles)
    return values if values.type.element == number else builder.fpext(values, ir.VectorType(number, lanes))


def _has_halves(context: Any) -> bool:
    """Return True if the processor converts fp16; otherwise LLVM would call a function that may not be there."""
    triple, _, features = context.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64")) or "+f16c" in features


def _bits_of_halves(builder: Any, halves: Any) -> Any:
    """Return fp32's bits for sign-extended fp16: they move up, and the product with 2^112 mends the exponent's bias."""
    lanes = halves.type.count

    def number(value: int) -> Any:
        return constant(_INT32, lanes, value)

    moved = builder.and_(builder.shl(halves, number(13)), number(0x8FFFE000))
    singles = ir.VectorType(ir.FloatType(), lanes)
    scaled = builder.fmul(builder.bitcast(moved, singles), constant(ir.FloatType(), lanes, 2.0**112))
    is_special = builder.icmp_unsigned("==", builder.and_(moved, number(0x0F800000)), number(0x0F800000))
    special = builder.or_(moved, number(0x7F800000))  # infinity and NaN keep the largest exponent
    return builder.select(is_special, special, builder.bitcast(scaled, halves.type))


def _lanes_pointer(builder: Any, data: Any, index: Any, lanes: int) -> Any:
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(ir.VectorType(data.type.pointee, lanes)))


def _alignment(element_type: Any) -> int:
    """Return an element's own alignment in bytes, since rows may start anywhere."""
    if isinstance(element_type, ir.IntType):
        return int(element_type.width) // 8
    return 8 if element_type == ir.DoubleType() else 4
