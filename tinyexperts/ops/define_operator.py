"""The definition of the operators: portable code, kernels, and fp32 sums whatever autocast asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from tinyexperts.ops.cpu.compile import JIT_IS_DISABLED
from tinyexperts.ops.gpu.dispatch import on_gpu
from tinyexperts.ops.kernels_setting import SETTING

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS", "xpu": "AutocastXPU"}


def define_operator(
    name: str,
    portable: Callable[..., object],
    cpu_kernel: Callable[..., object] | None = None,
    gpu_kernel: str | None = None,
) -> CustomOpDef:
    """Define an operator that changes none of its arguments.

    PyTorch's dispatcher switches autocast off for it, whichever kernel runs; without autocast this costs nothing.

    Args:
        name (str): the name under torch.ops.tinyexperts.
        portable (callable): the function in plain torch, for devices without a kernel.
        cpu_kernel (callable | None): the function for CPUs, with the same arguments.
        gpu_kernel (str | None): "module:name" of a GpuKernel for CUDA devices; the module is imported at its first use.

    The setting "portable" (ops/kernels_setting.py) leaves both kernels out.

    Returns:
        The operator.
    """
    operator = torch.library.custom_op(f"tinyexperts::{name}", portable, mutates_args=())
    if SETTING != "portable":
        if cpu_kernel is not None and not JIT_IS_DISABLED:
            operator.register_kernel("cpu", cpu_kernel)
        if gpu_kernel is not None:
            operator.register_kernel("cuda", on_gpu(gpu_kernel, portable))

    def call_outside(device_type: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with torch.autocast(device_type, enabled=False):
                return operator(*arguments)

        return call

    for device_type, key in _KEYS.items():
        torch.library.impl(operator._qualname, key, call_outside(device_type))
    return operator
