"""Triton's kernels, interpreted, in the place of the CPU's: the tests of the operators run on them as they are."""

from __future__ import annotations

import interpreter_bf16
import interpreter_checks
import numpy as np
from torch._library.custom_ops import OPDEFS
from triton.runtime.interpreter import GridExecutor

from tinyexperts.ops.gpu import dispatch


def replace_cpu_kernels(monkeypatch) -> None:
    """Make the operators take CPU tensors for those of a CUDA device."""
    interpreter_bf16.install()
    interpreter_checks.install()
    # It computes with numpy, which warns of infinities and NaN; a GPU does not.
    monkeypatch.setattr(GridExecutor, "__call__", np.errstate(all="ignore")(GridExecutor.__call__))
    monkeypatch.setattr(dispatch, "why_not", lambda device: None)
    for name, operator in OPDEFS.items():
        if name.startswith("tinyexperts::") and "cuda" in operator._backend_fns:
            monkeypatch.setitem(operator._backend_fns, "cpu", operator._backend_fns["cuda"])
