"""The device and the precision of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from tinyexperts.errors import InputError


def choose_device(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name (str): cpu, cuda, mps or xpu, with a number or without; auto is cuda if there is one, else cpu.

    Raises:
        InputError: torch knows or has no such device.
    """
    kinds = ("cpu", "cuda", "mps", "xpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in kinds:
        raise InputError(f"device must be auto or one of {', '.join(kinds)}, got {name!r}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from None
    return device


def choose_precision(precision: str, device: torch.device) -> str:
    """Return "fp32" or "bf16"; "auto" takes bf16 on GPUs that compute in it, fp32 elsewhere, where bf16 is slower."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which forward passes run."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def report_out_of_memory(device: torch.device | str) -> Iterator[None]:
    """Turn the failure to allocate a model's memory into an InputError.

    Raises:
        InputError: it does not fit into the device's memory.
    """
    try:
        yield
    except RuntimeError as error:
        sentence = next((line for line in str(error).splitlines() if "allocate" in line), None)
        if sentence is None:
            raise
        raise InputError(f"the model does not fit into the memory of {device}: {sentence}") from None
