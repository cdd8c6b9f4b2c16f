"""The environment variable TINYEXPERTS_KERNELS, in processes of their own: it is read once."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(*arguments: str, kernels: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TINYEXPERTS_KERNELS": kernels}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


SENTENCE = "TINYEXPERTS_KERNELS must be one of auto, portable, triton, got 'fast'"


def test_python_refuses_another_setting():
    process = run_python("-c", "import tinyexperts.ops", kernels="fast")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == f"tinyexperts.errors.InputError: {SENTENCE}"


def test_the_command_line_refuses_another_setting():
    process = run_python("-m", "tinyexperts", "bench", "layer", kernels="fast")
    assert (process.returncode, process.stderr, process.stdout) == (2, f"tinyexperts: {SENTENCE}\n", "")


PROGRAM = """
import torch
from tinyexperts.ops import expert_mlp
from tinyexperts.ops.expert_mlp import operator
y = expert_mlp(torch.ones(1, 4), torch.ones(2, 2, 4), torch.zeros(1, 1).long(), torch.ones(1, 1), "relu")
print("cpu" in operator._expert_mlp._backend_fns, y.tolist())
"""


def test_portable_is_for_cpus_too():
    process = run_python("-c", PROGRAM, kernels="portable")
    assert process.stderr == ""
    assert process.stdout == "False [[4.0, 4.0, 4.0, 4.0]]\n"
