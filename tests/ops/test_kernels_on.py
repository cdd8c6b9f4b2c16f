"""The phrase on the code that the operators run on a device."""

from __future__ import annotations

import pytest
import torch

from tinyexperts.ops import kernels_on as module
from tinyexperts.ops.kernels_on import kernels_on

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "changes", "phrase"),
    [
        (CPU, {}, "numba kernels"),
        (CPU, {"CPU_KERNELS_RUN": False}, "plain torch (NUMBA_DISABLE_JIT)"),
        (CPU, {"CPU_KERNELS_RUN": False, "SETTING": "portable"}, "plain torch (TINYEXPERTS_KERNELS=portable)"),
        (CUDA, {"SETTING": "portable"}, "plain torch (TINYEXPERTS_KERNELS=portable)"),
        (CUDA, {"why_not": lambda device: None, "triton_version": lambda: "3.7.1"}, "Triton 3.7.1 kernels"),
        (CUDA, {"why_not": lambda device: "Triton is not installed"}, "plain torch (Triton is not installed)"),
        (torch.device("mps"), {}, "plain torch (no kernels for mps)"),
    ],
)
def test_the_phrase(monkeypatch, device, changes, phrase):
    for name, value in changes.items():
        monkeypatch.setattr(module, name, value)
    assert kernels_on(device) == phrase
