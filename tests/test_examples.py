"""The examples run, and come to what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_layer_learns_in_a_plain_loop(capsys):
    right = example("layer_in_a_loop").main(steps=60)
    assert right > 0.9
    assert "step 40: loss" in capsys.readouterr().out


def test_a_run_from_python(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"The number {number} has {len(str(number))} digits. " * 40)
    written = example("run_from_python").main(tmp_path / "out", texts, num_steps=2, vocab_size=280)
    assert isinstance(written, str)
    assert "held-out tokens" in capsys.readouterr().out
    assert (tmp_path / "out/run/evaluation.json").is_file()


def test_a_decoder_of_transformers_learns_in_its_trainer(tmp_path, capsys):
    losses = example("huggingface_trainer").main(tmp_path, steps=30)
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 1
    assert "def " in capsys.readouterr().out
    assert '"kind": "peer"' in (tmp_path / "config.json").read_text()


@pytest.mark.slow
def test_a_study_from_python(tmp_path, tiny_data):
    losses = example("study_from_python").main(tiny_data, tmp_path / "study")
    assert losses.shape == (2, 2)
    assert losses.notna().all().all()


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *("huggingface_trainer", "layer_in_a_loop", "run_from_python", "study_from_python"),
    }
