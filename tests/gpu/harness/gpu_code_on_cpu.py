"""The operators' code for CUDA devices, run for tensors on the CPU: interpreted, or compiled and not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch._library.custom_ops import OPDEFS

import tinyexperts.ops  # noqa: F401  # defines the operators
from tinyexperts.ops.gpu import dispatch


@contextmanager
def gpu_code_on_cpu(*, checked: bool = True) -> Iterator[None]:
    """Let operators run on CPU tensors what they run on a CUDA device that has all that the kernels ask for.

    Args:
        checked (bool): False where nothing runs: a kernel is then compiled, and its numbers are not looked at.
    """

    def compile_only(kernel: dispatch.GpuKernel, plan: Any, portable: Any, arguments: Any) -> None:
        kernel.run(plan, *kernel.example(*arguments))

    ours = [operator for name, operator in OPDEFS.items() if name.startswith("tinyexperts::")]
    moved = [operator for operator in ours if {"cpu", "cuda"} <= operator._backend_fns.keys()]
    before = [operator._backend_fns["cpu"] for operator in moved]
    check = dispatch._check if checked else compile_only
    with patch.object(dispatch, "why_not", lambda device: None), patch.object(dispatch, "_check", check):
        for operator in moved:
            operator._backend_fns["cpu"] = operator._backend_fns["cuda"]
        try:
            yield
        finally:
            for operator, function in zip(moved, before, strict=True):
                operator._backend_fns["cpu"] = function
