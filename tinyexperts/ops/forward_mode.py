"""The operators have no forward-mode derivatives, and torch would take them for zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tinyexperts.errors import InputError


def refuse_forward_mode(operator: str, *inputs: Tensor) -> None:
    """Raise InputError where an input carries a tangent (torch.func.jvp, torch.autograd.forward_ad)."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):  # type: ignore[no-untyped-call]
        raise InputError(
            f"{operator} has no forward-mode derivative (torch.func.jvp): use reverse mode (torch.autograd.grad)"
        )
