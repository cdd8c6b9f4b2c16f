"""bf16 under TRITON_INTERPRET=1 as GPUs have it.

Triton's interpreter (3.6 and 3.7) keeps bf16 as bit patterns. A conversion from fp32 cuts bits off where GPUs round to
the nearest even number, subnormal numbers come out wrong, and arithmetic, comparisons and tl.dot take the patterns for
integers (https://github.com/triton-lang/triton/issues/4972). `install` puts torch's conversions there, lets tl.dot
multiply numbers, and refuses what is left: kernels convert to fp32 before they calculate.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_NEAREST_EVEN = (None, interpreter._ir.ROUNDING_MODE.RTNE)
_convert_float = interpreter._convert_float
_cast = interpreter.InterpreterBuilder.cast_impl
_dot = interpreter.InterpreterBuilder.create_dot
_binary = interpreter.InterpreterBuilder.binary_op
_unary = interpreter.InterpreterBuilder.unary_op


def install() -> None:
    """Repair bf16 in the interpreter of this process."""
    interpreter._convert_float = _convert
    builder = interpreter.InterpreterBuilder
    builder.cast_impl, builder.create_dot = _cast_checked, _dot_of_numbers
    builder.binary_op, builder.unary_op = _binary_checked, _unary_checked


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16, to the nearest even; returns the patterns (uint16)."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """Return the numbers (fp32) of patterns (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _convert(data, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        if rounding not in _NEAREST_EVEN:
            raise NotImplementedError(f"a conversion to bf16 by {rounding}: the tests know rounding to nearest even")
        return bf16_bits(data.view(np.float32))
    if source == tl.bfloat16 and target == tl.float32:
        return bf16_values(data).view(np.uint32)
    return _convert_float(data, source, target, rounding)


def _cast_checked(self, source, target):
    pair = {source.dtype.scalar, target.scalar}
    if tl.bfloat16 in pair and len(pair) == 2 and tl.float32 not in pair:
        raise NotImplementedError(
            f"a conversion of {source.dtype} to {target}: go by fp32, the interpreter has no other"
        )
    return _cast(self, source, target)


def _dot_of_numbers(self, a, b, *rest):
    if a.dtype.scalar == tl.bfloat16:
        a, b = (interpreter.TensorHandle(bf16_values(each.data), tl.float32) for each in (a, b))
    return _dot(self, a, b, *rest)


def _binary_checked(self, left, right, operation):
    _refuse_bf16(operation, left, right)
    return _binary(self, left, right, operation)


def _unary_checked(self, operand, operation):
    _refuse_bf16(operation, operand)
    return _unary(self, operand, operation)


def _refuse_bf16(operation, *operands) -> None:
    if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
        name = getattr(operation, "__name__", operation)
        raise NotImplementedError(
            f"{name} of bf16 numbers: convert to fp32 first, the interpreter has bit patterns only"
        )
