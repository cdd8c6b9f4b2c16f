"""Triton's kernels on a CPU, by Triton's interpreter, in a process of their own.

    TRITON_INTERPRET=1 pytest tests/gpu/interpreted

Triton reads the variable when it is imported, and kernels are interpreted or compiled for the whole process; so nothing
is collected here without it. The interpreter is repaired for bf16 and checks memory accesses (tests/gpu/harness).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import interpreter_bf16
    import interpreter_checks

    interpreter_bf16.install()
    interpreter_checks.install()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty and its like return with NaN, integers with their largest number.

    What a kernel forgets to write shows then. A test that wants a large tensor whose pages cost nothing sets
    torch.utils.deterministic.fill_uninitialized_memory to False for it.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def silent_numpy():
    """The interpreter computes with numpy, which warns of infinities and NaN; a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def launched_kernels():
    """The names of the kernels that a test has launched, in order."""
    interpreter_checks.launched.clear()
    return interpreter_checks.launched


@pytest.fixture
def triton_is_allowed(monkeypatch):
    """Let the functions for CUDA devices take CPU tensors: the device and its Triton are not asked."""
    from tinyexperts.ops.gpu import dispatch

    monkeypatch.setattr(dispatch, "why_not", lambda device: None)
