"""Vectors of LLVM's for the CPU kernels: any processor's vector unit takes them, by whatever name.

For the inner loops whose code must not depend on what the compiler makes of a loop: it vectorises some, and unrolls
them so far that short ones stay scalar; and it takes seconds to do it.
"""

from __future__ import annotations

from typing import Any, cast

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

_INT32 = ir.IntType(32)


def array_data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """A pointer to the first element of an array, which must be C-contiguous."""
    return context.make_array(array_type)(context, builder, array).data


def array_shape(context: Any, builder: Any, array_type: Any, array: Any) -> list[Any]:
    lengths = context.make_array(array_type)(context, builder, array).shape
    return [builder.extract_value(lengths, axis) for axis in range(array_type.ndim)]


def variable(builder: Any, initial: Any) -> Any:
    """A pointer to a value that loops change; the compiler keeps it in registers."""
    return cast(Any, cgutils.alloca_once_value)(builder, initial)


def load(builder: Any, data: Any, index: Any, lanes: int) -> Any:
    """`lanes` elements from an index on."""
    return builder.load(_vector_pointer(builder, data, index, lanes), align=_alignment(data.type.pointee))


def store(builder: Any, vector: Any, data: Any, index: Any) -> None:
    pointer = _vector_pointer(builder, data, index, vector.type.count)
    builder.store(vector, pointer, align=_alignment(data.type.pointee))


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """The same number in all lanes."""
    vector_type = ir.VectorType(value.type, lanes)
    vector = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes))


def constant(element_type: Any, lanes: int, value: Any) -> Any:
    return ir.Constant(ir.VectorType(element_type, lanes), [value] * lanes)


def total(builder: Any, vector: Any) -> Any:
    """The sum of the lanes, a power of two of them."""
    while (half := vector.type.count // 2) >= 1:
        low, high = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_INT32, half), list(lanes)))
            for lanes in (range(half), range(half, 2 * half))
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, _INT32(0))


def prefetch(builder: Any, pointer: Any) -> None:
    """Ask for the cache line of an address, into L2: into L1, rows would push each other out before they are used."""
    pointer = builder.bitcast(pointer, ir.PointerType(ir.IntType(8)))
    function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
    function = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), function_type)
    # A read, locality 2 (L2 on x86 and ARM), of data.
    builder.call(function, [pointer, _INT32(0), _INT32(2), _INT32(1)])


def widened(context: Any, builder: Any, vector: Any, dtype: Any, number: Any) -> Any:
    """A table's elements, of numba's type `dtype`, exactly as numbers of LLVM's type: uint16 is bf16, int16 fp16."""
    lanes = vector.type.count
    singles, bits_type = ir.VectorType(ir.FloatType(), lanes), ir.VectorType(_INT32, lanes)
    if dtype == types.uint16:  # bf16 is the upper half of fp32
        bits = builder.zext(vector, bits_type)
        vector = builder.bitcast(builder.shl(bits, constant(_INT32, lanes, 16)), singles)
    elif dtype == types.int16 and _has_halves(context):
        vector = builder.fpext(builder.bitcast(vector, ir.VectorType(ir.HalfType(), lanes)), singles)
    elif dtype == types.int16:
        vector = builder.bitcast(_bits_of_halves(builder, builder.sext(vector, bits_type)), singles)
    elif dtype == types.int8:
        vector = builder.sitofp(vector, singles)
    return vector if vector.type.element == number else builder.fpext(vector, ir.VectorType(number, lanes))


def _has_halves(context: Any) -> bool:
    """Whether the processor converts fp16 by itself; otherwise LLVM would call a function that may not be there."""
    triple, _, features = context.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64")) or "+f16c" in features


def _bits_of_halves(builder: Any, halves: Any) -> Any:
    """fp16, sign-extended -> fp32: the bits move up, and the product with 2^112 mends the bias, of subnormals too."""
    lanes = halves.type.count

    def number(value: int) -> Any:
        return constant(_INT32, lanes, value)

    moved = builder.and_(builder.shl(halves, number(13)), number(0x8FFFE000))
    singles = ir.VectorType(ir.FloatType(), lanes)
    scaled = builder.fmul(builder.bitcast(moved, singles), constant(ir.FloatType(), lanes, 2.0**112))
    is_special = builder.icmp_unsigned("==", builder.and_(moved, number(0x0F800000)), number(0x0F800000))
    special = builder.or_(moved, number(0x7F800000))  # infinity and NaN
    return builder.select(is_special, special, builder.bitcast(scaled, halves.type))


def _vector_pointer(builder: Any, data: Any, index: Any, lanes: int) -> Any:
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(ir.VectorType(data.type.pointee, lanes)))


def _alignment(element_type: Any) -> int:
    """In bytes: an element's own, since rows may start anywhere."""
    if isinstance(element_type, ir.IntType):
        return int(element_type.width) // 8
    return 8 if element_type == ir.DoubleType() else 4
