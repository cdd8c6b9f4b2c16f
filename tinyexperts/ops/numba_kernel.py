"""How the CPU kernels are compiled, and the three things that they need and numba lacks: prefetching, 16-bit floats.

A kernel is serial and releases the GIL: cpu_threads.py runs it in parts. Fast-math is limited to what leaves NaN and
infinities alone: sums may be taken in another order (so that they vectorise), products may be fused into them; an exact
kernel has none of it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic, overload
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

_EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # that is, no check for a division by zero
_FAST: dict[str, Any] = {**_EXACT, "fastmath": {"reassoc", "contract", "nsz"}}
CACHE_LINE_BYTES = 64


def kernel(function: _Function) -> _Function:
    """Compile a function with numba at its first call; kept on disk, where any folder for that can be written."""
    return _compiled(function, _FAST)


def exact_kernel(function: _Function) -> _Function:
    """As `kernel`, but every sum is rounded as it is written."""
    return _compiled(function, _EXACT)


@functools.cache
def _digest_of_operators() -> str:
    """Of the sources of tinyexperts.ops, where the functions are that kernels take in."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _compiled(function: _Function, options: dict[str, Any]) -> _Function:
    # numba names what it keeps by the function and compiles again when that function's own file changes, not when a
    # function that it takes in from another file does: so the name tells the state of all of them.
    function.__qualname__ += f"_{_digest_of_operators()}"
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        compiled = numba.njit(**options)(function)
    return cast(_Function, compiled)


def inlined(function: _Function) -> _Function:
    """A function of kernels' own, compiled into each of them: called, it would cost more than what it does."""
    return cast(_Function, numba.njit(forceinline=True, **_FAST)(function))


def exact_inlined(function: _Function) -> _Function:
    """As `inlined`, for exact kernels."""
    return cast(_Function, numba.njit(forceinline=True, **_EXACT)(function))


def array_of(tensor: Tensor) -> Any:
    """A numpy view for a kernel, C-contiguous; bf16 comes as uint16 and fp16 as int16, which `widen` tells apart."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype == torch.float16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line of an address, into L2: into L1, rows would push each other out before they are used."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer_type = ir.PointerType(ir.IntType(8))
        pointer = builder.inttoptr(arguments[0], pointer_type)
        int32 = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [pointer_type, int32, int32, int32])
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer_type,), function_type)
        # A read, locality 2 (L2 on x86 and ARM), of data.
        builder.call(function, [pointer, int32(0), int32(2), int32(1)])
        return context.get_dummy_value()

    return types.void(types.intp), code


prefetch: Callable[[Any], None] = cast(Any, _prefetch)


def _bytes_of_element(array):  # type: ignore[no-untyped-def]
    raise NotImplementedError("for kernels only")


@overload(_bytes_of_element)
def _overload_of_bytes_of_element(array):  # type: ignore[no-untyped-def]
    num_bytes = array.dtype.bitwidth // 8
    return lambda array: num_bytes


# What numba's `itemsize` is, known to the compiler: loops over an element's bytes are unrolled. For kernels only.
bytes_of_element: Callable[[Any], int] = _bytes_of_element


@intrinsic
def _bitcast(typing_context: Any, bits: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), code


_float_of_bits: Callable[[Any], Any] = cast(Any, _bitcast)


def _element(value):  # type: ignore[no-untyped-def]  # numba compares its signature with the overload's, as written
    raise NotImplementedError("for kernels only")


@overload(_element)
def _overload_of_element(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:  # bf16 is the upper half of fp32
        return lambda value: _float_of_bits(np.uint32(value) << np.uint32(16))
    if value == types.int16:
        return _widen_half
    if value == types.int8:
        return lambda value: np.float32(value)
    return lambda value: value


def _widen_half(value):  # type: ignore[no-untyped-def]
    """fp16 -> fp32: exponent and mantissa move up, and the product with 2^112 mends the bias, of subnormals too."""
    bits = np.uint32(np.uint16(value))
    magnitude = _float_of_bits((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
    if (bits & np.uint32(0x7C00)) == np.uint32(0x7C00):  # infinity and NaN
        magnitude = _float_of_bits(np.uint32(0x7F800000) | ((bits & np.uint32(0x3FF)) << np.uint32(13)))
    return -magnitude if bits & np.uint32(0x8000) else magnitude


# A table's element as a number to compute with: 16 bits become fp32, exactly. For kernels only.
widen: Callable[[Any], Any] = _element
