"""The choice between Triton's kernels and plain torch for operands on a CUDA device.

Triton's kernels run where the device and its Triton allow it, the operands are within the kernels' limits, and a check
at the first use of a kind of kernel finds the numbers of plain torch in fp64. The check runs the very kernel that is
wanted (the same constants, so the same machine code) on a few tokens, once a process. Everything else runs plain torch.

Triton is imported at the first use of a CUDA device: it takes 0.2 s, and may not be there.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.kernels_setting import SETTING, VARIABLE

OLDEST_TRITON = (3, 6)
LOWEST_CAPABILITY = (8, 0)

# The largest relative error (of the norm) that an output of a type may have.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


class BeyondLimits(Exception):
    """Operands that Triton's kernels don't take; the message says why."""


class _CantBeLoaded(Exception):
    """A module of kernels that Python can't import; the message says why."""


def _as_they_are(outputs: Any) -> Any:
    return outputs


@dataclass(frozen=True)
class GpuKernel:
    """An operation by Triton's kernels.

    Args:
        plan (callable): returns the constants of the kernels for operands, hashable; raises BeyondLimits for others.
        run (callable): returns the outputs of the plan and the operands.
        example (callable): returns small operands of the same plan as given ones, for the check.
        num_changed (int): how many operands, the first ones, it changes in place; it returns nothing then.
        compared (callable): what the check compares of the outputs.
    """

    plan: Callable[..., Hashable]
    run: Callable[..., Any]
    example: Callable[..., tuple[Any, ...]]
    num_changed: int = 0
    compared: Callable[[Any], Any] = _as_they_are


_REPORT = "Please report this text as an issue of tinyexperts"

# What the check of a device, an operation and a plan found: None if it passed, else the fault.
_faults: dict[tuple[torch.device, str, Hashable], str | None] = {}


def on_gpu(place: str, portable: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function for CUDA devices: Triton's kernels where they can be used, else `portable`.

    Args:
        place (str): "module:name" of a GpuKernel; the module imports triton, and is imported at the first call.
        portable (callable): the same in plain torch, for any floating-point type.

    The function raises InputError where the setting "triton" asks for kernels that can't be used.
    """

    @functools.wraps(portable)
    def call(*arguments: Any) -> Any:
        operand = next(argument for argument in arguments if isinstance(argument, Tensor))
        device = operand.device
        reason = why_not(device)
        if reason is None:
            try:
                kernel = _load(place)
                plan = kernel.plan(*arguments)
                # Triton launches on the current device, whatever the operands' is.
                with torch.cuda.device_of(operand):  # type: ignore[no-untyped-call]
                    reason = _fault(device, place, kernel, plan, portable, arguments)
                    if reason is None:
                        return kernel.run(plan, *arguments)
            except (BeyondLimits, _CantBeLoaded) as limit:
                reason = str(limit)
        if SETTING == "triton":
            raise InputError(f"{VARIABLE}=triton, and Triton's kernel of {portable.__name__} can't be used: {reason}")
        return portable(*arguments)

    return call


def why_not(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on a device; None if they can. It is told once, by a warning."""
    if SETTING == "portable":
        return f"{VARIABLE}=portable"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _missing_on(index)


@functools.cache
def _missing_on(index: int) -> str | None:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    reason = missing(torch.version.hip is not None, name, capability)
    if reason is not None and SETTING == "auto":
        warnings.warn(f"the operators run in plain torch on device {index}: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def missing(is_amd: bool, device_name: str, capability: tuple[int, int]) -> str | None:
    """Return what a device lacks for Triton's kernels; None if nothing."""
    try:
        version = triton_version()
    except ModuleNotFoundError as error:
        if error.name != "triton":
            return f"Triton can't be imported: {error}"
        return "Triton is not installed: pip install 'tinyexperts[gpu]'"
    except (ImportError, OSError) as error:  # OSError: a library that it needs
        return f"Triton can't be imported: {error}"
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"Triton must be {'.'.join(map(str, OLDEST_TRITON))} or newer, found {version}"
    if is_amd:
        if SETTING == "triton":
            return None
        return f"the kernels compile for AMD's devices, but have run on none: try {VARIABLE}=triton"
    if capability < LOWEST_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (LOWEST_CAPABILITY, capability))
        return f"the compute capability must be {needed} or higher, and that of {device_name} is {found}"
    return None


def triton_version() -> str:
    """Return the version of Triton."""
    version: str = importlib.import_module("triton").__version__
    return version


# The modules that can't be imported, and why.
_unloadable: dict[str, str] = {}


def _load(place: str) -> GpuKernel:
    """Return the GpuKernel at "module:name"; raises _CantBeLoaded, and tells it once."""
    module, name = place.split(":")
    if module not in _unloadable:
        try:
            kernel: GpuKernel = getattr(importlib.import_module(module), name)
            return kernel
        except Exception as error:  # whatever another version of Triton raises
            _unloadable[module] = f"{module} can't be imported: {type(error).__name__}: {error}"
            if SETTING == "auto":
                warnings.warn(
                    f"some operators run in plain torch from now on: {_unloadable[module]} "
                    f"(torch {torch.__version__}, Triton {triton_version()}). {_REPORT}",
                    RuntimeWarning,
                    stacklevel=3,
                )
    raise _CantBeLoaded(_unloadable[module])


def _fault(
    device: torch.device,
    place: str,
    kernel: GpuKernel,
    plan: Hashable,
    portable: Callable[..., Any],
    arguments: Sequence[Any],
) -> str | None:
    """Return what is wrong with the kernels of a plan on a device, None if nothing; checked once."""
    key = (device, place, plan)
    if key not in _faults:
        if is_capturing(device):
            reason = "a kernel is checked at its first use, and that is inside of a graph's capture: run it once before"
            if SETTING == "auto":
                warnings.warn(f"{portable.__name__} runs in plain torch: {reason}", RuntimeWarning, stacklevel=3)
            return reason
        _faults[key] = fault = _check(kernel, plan, portable, arguments)
        if fault is not None and SETTING == "auto":
            warnings.warn(
                f"{portable.__name__} runs in plain torch from now on, since Triton's kernel fails its check: {fault} "
                f"({describe(device)}; {plan}). {_REPORT}",
                RuntimeWarning,
                stacklevel=3,
            )
    return _faults[key]


def is_capturing(device: torch.device) -> bool:
    """Return True inside of the capture of a CUDA graph, which can't wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def describe(device: torch.device) -> str:
    """Return a device's name and the versions of what runs on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, torch {torch.__version__}, Triton {triton_version()}"


def _check(kernel: GpuKernel, plan: Hashable, portable: Callable[..., Any], arguments: Sequence[Any]) -> str | None:
    """Return how the kernels of a plan differ from plain torch in fp64, on small operands; None if they don't."""
    try:
        operands = kernel.example(*arguments)
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in operands]
        found, expected = kernel.run(plan, *operands), portable(*wide)
        if kernel.num_changed:
            found, expected = operands[: kernel.num_changed], wide[: kernel.num_changed]
        outputs, truths = (_tensors(kernel.compared(each)) for each in (found, expected))
        for number, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
            distance = relative_error(output, truth)  # waits for the device, whose errors show here
            if not distance <= TOLERANCES.get(output.dtype, 0.0):
                return f"output {number} differs by {distance:.2g} of its norm"
    except (BeyondLimits, torch.OutOfMemoryError):  # they say nothing about the kernel
        raise
    except Exception as error:  # whatever the compiler or the driver raises: plain torch is there instead
        return f"{type(error).__name__}: {error}"
    return None


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def relative_error(output: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference by that of the truth; for integers 0 if all are equal, else infinity."""
    if not output.is_floating_point():
        return 0.0 if torch.equal(output, truth) else float("inf")
    if output.shape != truth.shape:
        return float("inf")
    difference, norm = (output.double() - truth.double()).norm(), truth.double().norm()
    return 0.0 if not difference else float(difference / norm)
