"""Fixtures for all tests: one CPU thread a process, and a small data set with a small configuration to train on."""

from __future__ import annotations

import os
import random
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_tensors_on_gpu import cpu_tensors_on_gpu

from tinyexperts import cli
from tinyexperts.data import PrepareConfig, prepare
from tinyexperts.layers import PEER, DenseConfig, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import TransformerConfig
from tinyexperts.ops.without_kernels import without_kernels
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients
from tinyexperts.training import TrainConfig
from tinyexperts.training.config import CheckpointConfig, with_settings

torch.set_num_threads(1)


def pytest_configure(config):
    """Compile the kernels of a training step once, before several workers and their processes do so side by side."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        layer = PEER(16, 64, num_heads=2, experts_per_head=3, sparse=True)
        optimizer = RowSparseAdam([layer.experts], lr=1e-3, fused=True)
        with deferred_gradients([optimizer]):
            layer(torch.randn(5, 16)).sum().backward()
        clip_gradient_norm_(layer.parameters(), 1.0)
        optimizer.step()


def pytest_collection_modifyitems(items):
    """The file that takes longest first: at the end all other workers would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_studies.py")


SPARSE_LAYERS = {
    "dense": DenseConfig(),
    "moe": ExpertChoiceMoEConfig(num_experts=4, hidden_dim=16),
    "pkm": ProductKeyMemoryConfig(num_experts=64, num_heads=2, experts_per_head=3, query_dim=6),
    "peer": PEERConfig(num_experts=64, num_heads=2, experts_per_head=3, query_dim=6),
}


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run the command line in this process; returns (exit code, standard output, standard error)."""

    def run(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["tinyexperts", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data set of 60 short documents, vocabulary 300."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    words = ["red", "green", "blue", "cat", "dog", "house", "runs", "sees", "the", "a", "under", "over", "and", "tree"]
    for number in range(60):
        (folder / f"text{number}.txt").write_text(" ".join(draw.choices(words, k=120)))
    output = tmp_path_factory.mktemp("data") / "tiny"
    prepare(PrepareConfig(files=(folder,), output=output, vocab_size=300, validation_fraction=0.1))
    return output


@pytest.fixture
def make_config(tiny_data, tmp_path):
    """A function that makes the configuration of a run of a few small steps.

    Its arguments are settings, those of a part as a dictionary: checkpoint={"every": 2}.
    """

    def make(kind: str = "peer", model: dict | None = None, **changes) -> TrainConfig:
        options = {
            "vocab_size": 300,
            "context_length": 16,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "expert_layer": SPARSE_LAYERS[kind],
        }
        config = TrainConfig(
            run=tmp_path / "run",
            data=tiny_data,
            model=TransformerConfig(**(options | (model or {}))),
            num_steps=8,
            threads=1,
            validation_tokens=64,
            validation_every=4,
            log_every=2,
            checkpoint=CheckpointConfig(every=3),
        )
        settings = {}
        for name, value in changes.items():
            settings |= (
                {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
            )
        return with_settings(config, settings)

    return make


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


ON_GPU = [pytest.param("gpu", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["triton"] if INTERPRETED else ["cpu", "portable", *ON_GPU])
def kernels(request):
    """Run a test with the CPU's kernels, with what devices without kernels run, and on a GPU where there is one.

    With TRITON_INTERPRET=1 in the environment: with Triton's kernels, interpreted. Yields cpu, portable or triton.
    """
    contexts = {"cpu": nullcontext, "portable": without_kernels, "triton": _interpreted, "gpu": cpu_tensors_on_gpu}
    with contexts[request.param]():
        yield "triton" if request.param == "gpu" else request.param


@contextmanager
def _interpreted():
    import interpreter_bf16
    import interpreter_checks
    from gpu_code_on_cpu import gpu_code_on_cpu

    interpreter_bf16.install()
    interpreter_checks.install()
    # The interpreter computes with numpy, which warns of infinities and NaN; a GPU does not.
    with np.errstate(all="ignore"), gpu_code_on_cpu():
        yield


@pytest.fixture
def wait_for_lines():
    """A function that waits for this many lines of a run's metrics, and fails if its process has ended."""

    def wait(run: Path, num_lines: int, process) -> None:
        path = run / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and len(path.read_text().splitlines()) >= num_lines:
                return
            time.sleep(0.005)
        process.kill()
        pytest.fail(f"the run did not start: {process.communicate()[1]}")

    return wait
