"""The compilation of the CPU's kernels, and prefetching, which numba lacks.

A kernel is serial and releases the GIL: threads.py runs it in parts. Fast-math is limited so that NaN and infinities
stay: sums may be taken in another order (so that they vectorize), and products may be fused into them. An exact kernel
has none of it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.cpu import simd
from tinyexperts.ops.cpu.kernel_cache import KernelCache
from tinyexperts.ops.kernels_setting import SETTING

_Function = TypeVar("_Function", bound=Callable[..., Any])

_EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # that is, no check for a division by zero
_FAST: dict[str, Any] = {**_EXACT, "fastmath": {"reassoc", "contract", "nsz"}}
CACHE_LINE_BYTES = 64

# True if NUMBA_DISABLE_JIT is set: Python itself can't run the instructions that the kernels are made of.
JIT_IS_DISABLED = bool(numba.config.DISABLE_JIT)  # type: ignore[attr-defined]
if JIT_IS_DISABLED:
    warnings.warn(
        "NUMBA_DISABLE_JIT is set, so that the CPU's kernels can't be compiled: layers run in plain torch, and slower",
        stacklevel=2,
    )

CPU_KERNELS_RUN = not JIT_IS_DISABLED and SETTING != "portable"
"""False where operators run in plain torch on CPUs too."""


def kernel(function: _Function) -> _Function:
    """Compile a function with numba at its first call, and keep it on disk if a folder for that can be written."""
    return _compiled(function, _FAST)


def exact_kernel(function: _Function) -> _Function:
    """Compile a function as `kernel` does, but round every sum as it is written."""
    return _compiled(function, _EXACT)


@functools.cache
def _digest_of_operators() -> str:
    """Return the digest of the sources of tinyexperts.ops, which hold all functions that kernels take in."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _compiled(function: _Function, options: dict[str, Any]) -> _Function:
    if JIT_IS_DISABLED:
        return _refusing(function)
    # numba names an entry by its function, and compiles again when the function's own file changes, but not when the
    # file of a function that it inlines does: so the name holds a digest of all files.
    function.__qualname__ += f"_{_digest_of_operators()}"
    compiled = numba.njit(**options)(function)
    with contextlib.suppress(RuntimeError):  # neither the package's folder nor the user's cache can be written
        compiled._cache = KernelCache(function)
    compiled.compile = _without_collection(compiled.compile)
    return cast(_Function, compiled)


def _refusing(function: _Function) -> _Function:
    """Return a function in place of a kernel that can't be compiled; the operators don't call it."""

    @functools.wraps(function)
    def refuse(*_: Any) -> Any:
        raise InputError("the kernels for CPUs are compiled by numba, got NUMBA_DISABLE_JIT: unset it")

    return cast(_Function, refuse)


def _without_collection(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without collections of garbage, which go through all of torch's objects: half the time of a load.

    If two threads compile at once, the first to begin turns them on again, perhaps before the other has ended.
    """

    @functools.wraps(compile_)
    def wrapped(*arguments: Any) -> Any:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return compile_(*arguments)
        finally:
            if was_enabled:
                gc.enable()

    return wrapped


def inlined(function: _Function) -> _Function:
    """Compile a function into each kernel that uses it: a call would cost more than what it does."""
    return cast(_Function, numba.njit(forceinline=True, **_FAST)(function))


def exact_inlined(function: _Function) -> _Function:
    """Compile a function as `inlined` does, for exact kernels."""
    return cast(_Function, numba.njit(forceinline=True, **_EXACT)(function))


def array_of(tensor: Tensor) -> Any:
    """Return a C-contiguous numpy view for a kernel; bf16 comes as uint16 and fp16 as int16 (simd.widen)."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype == torch.float16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


def array_of_weights(tensor: Tensor) -> Any:
    """Return the same as `array_of`, for parameters: FSDP2 can still shrink their memory, which numpy() prevents.

    It takes 6 us more.
    """
    tensor = tensor.detach().contiguous()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.view(torch.uint16 if tensor.dtype == torch.bfloat16 else torch.int16)
    return np.from_dlpack(tensor)


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        simd.prefetch(builder, builder.inttoptr(arguments[0], ir.PointerType(ir.IntType(8))))
        return context.get_dummy_value()

    return types.void(types.intp), code


# Ask for the cache line of an address. For kernels only.
prefetch: Callable[[Any], None] = cast(Any, _prefetch)
