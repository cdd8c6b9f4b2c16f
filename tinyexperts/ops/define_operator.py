"""The definition of the operators: portable code, a kernel for CPUs, and fp32 sums whatever autocast asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from tinyexperts.ops.cpu.compile import JIT_IS_DISABLED

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS", "xpu": "AutocastXPU"}


def define_operator(
    name: str, portable: Callable[..., object], cpu_kernel: Callable[..., object] | None = None
) -> CustomOpDef:
    """Define an operator that changes none of its arguments.

    PyTorch's dispatcher switches autocast off for it, whichever kernel runs; without autocast this costs nothing.

    Args:
        name (str): the name under torch.ops.tinyexperts.
        portable (callable): the function in plain torch, for devices without a kernel.
        cpu_kernel (callable | None): the function for CPUs, with the same arguments.

    Returns:
        The operator.
    """
    operator = torch.library.custom_op(f"tinyexperts::{name}", portable, mutates_args=())
    if cpu_kernel is not None and not JIT_IS_DISABLED:
        operator.register_kernel("cpu", cpu_kernel)

    def call_outside(device_type: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with torch.autocast(device_type, enabled=False):
                return operator(*arguments)

        return call

    for device_type, key in _KEYS.items():
        torch.library.impl(operator._qualname, key, call_outside(device_type))
    return operator
