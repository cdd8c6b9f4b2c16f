"""Where a run computes, and in what precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from tinyexperts.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there is one, else cpu.

    Raises:
        InputError: torch knows or has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from None
    return device


def choose_precision(precision: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; "auto" takes bf16 on GPUs that compute in it, and fp32 elsewhere, where bf16 is slower."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
