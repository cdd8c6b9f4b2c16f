"""A run that is killed at a random step and resumed ends bit for bit as the run that never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch
from training_process import TrainingProcess

from tinyexperts.training import load_model, train
from tinyexperts.training.checkpoint import checkpoints

# Kept out of the comparison: how long it took.
CLOCK = {"seconds", "tokens_per_second", "flops_per_second"}


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def all_tensors(run):
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(checkpoints(run)[-1].glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_end(got, expected):
    assert metrics(got) == metrics(expected)
    tensors, reference = all_tensors(got), all_tensors(expected)
    assert tensors.keys() == reference.keys()
    assert any(name.startswith("optimizer.") for name in tensors)
    for name, tensor in reference.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "table_gradients"),
    [
        ("peer", "sparse"),
        pytest.param("peer", "dense", marks=pytest.mark.slow),
        pytest.param("moe", "auto", marks=pytest.mark.slow),
    ],
)
def test_killed_at_a_random_step_and_resumed(make_config, wait_for_lines, tmp_path, kind, table_gradients):
    options = {
        "num_steps": 120,
        "log_every": 3,  # no divisor of the steps between checkpoints: the mean loss of a line spans a checkpoint
        "validation_every": 50,
        "checkpoint.every": 7,
        "optimizer.table_gradients": table_gradients,
    }
    whole = make_config(kind, run=tmp_path / "whole", **options)
    train(whole, progress=False)
    killed = make_config(kind, run=tmp_path / "killed", **options)
    kill_at = random.Random(time.time_ns()).randint(1, 30)
    child = TrainingProcess(killed)
    wait_for_lines(killed.run, kill_at, child)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, f"it ended before it was killed at {kill_at}"
    train(killed, resume=True, progress=False)
    assert_same_end(killed.run, whole.run)


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR2))],
)
def test_a_signal_saves_and_says_how_to_resume(make_config, wait_for_lines, tmp_path, number):
    options = {"num_steps": 150, "log_every": 1, "validation_every": 100, "checkpoint.every": 1000}
    stopped = make_config(run=tmp_path / "stopped", **options)
    child = TrainingProcess(stopped)
    wait_for_lines(stopped.run, 5, child)
    os.kill(child.pid, number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"{number.name}: saved {stopped.run} at step " in said
    assert said.rstrip().endswith("; to go on: train(config, resume=True)")
    assert len(checkpoints(stopped.run)) == 1
    train(stopped, resume=True, progress=False)
    whole = make_config(run=tmp_path / "whole", **options)
    train(whole, progress=False)
    assert_same_end(stopped.run, whole.run)


def test_two_runs_of_one_configuration_are_bit_equal(make_config, tmp_path):
    for name in ("a", "b"):
        train(make_config(run=tmp_path / name), progress=False)
    assert_same_end(tmp_path / "a", tmp_path / "b")
    other = make_config(run=tmp_path / "c", seed=1)
    train(other, progress=False)
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")
    assert load_model(tmp_path / "c")
