"""A setting: what is measured, what is left out, and the JSON that holds it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tinyexperts.bench import contestants, view
from tinyexperts.bench.contestants import make_layer
from tinyexperts.bench.measurement import Measurement, from_json, measure_setting, to_json
from tinyexperts.layers import PEER

D, N, M = 16, 64, 8
ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*layer*.json"))


def measure(layer: PEER, *, max_bytes: float = 1e9, **options) -> Measurement:
    return measure_setting(layer, num_tokens=M, threads=1, ids=("uniform",), repeats=1, max_bytes=max_bytes, **options)


def test_what_does_not_fit_is_left_out():
    table_bytes = N * 2 * D * 4
    result = measure(make_layer(D, N), max_bytes=2.2 * table_bytes, baselines=("reference",))
    assert list(result.layer.steps) == ["row"]
    assert list(result.baselines) == ["reference"]
    assert result.baselines["reference"].step is None
    assert result.left_out == [
        "the step with a second moment an element: it needs 2.29e-05 GiB",
        "operators in plain torch: the training step needs 7.68e-05 GiB in addition to ours",
    ]
    assert "training step" in view.figure([result])
    assert len(view.tables([result])) == 3


def test_without_peer_pytorch_the_rest_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "PEER_pytorch", None)
    baselines = ("dense_equal_width", "peer_pytorch_adam", "peer_pytorch_sparse_adam")
    result = measure(make_layer(D, N), baselines=baselines)
    assert list(result.baselines) == ["dense_equal_width"]
    assert result.left_out == [
        "PEER-pytorch, Adam: not installed (pip install PEER-pytorch)",
        "PEER-pytorch, SparseAdam: not installed (pip install PEER-pytorch)",
    ]


@pytest.mark.slow
def test_without_a_compiler_the_rest_is_measured(monkeypatch):
    def fail(self):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    contestant = contestants.compiled_reference(make_layer(D, N))
    monkeypatch.setattr(contestants, "compiled_reference", lambda layer: contestant)
    monkeypatch.setattr(
        type(contestant), "forward", lambda self, x: fail(self) if self is contestant else self.module(x)
    )
    result = measure(make_layer(D, N), baselines=("compiled_reference", "dense_equal_width"))
    assert list(result.baselines) == ["dense_equal_width"]
    reason = "torch.compile failed (InvalidCxxCompiler: No working C++ compiler found)"
    assert result.left_out == [f"reference, torch.compile: {reason}"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_are_read_and_written_as_they_are(path):
    results = json.loads(path.read_text())["results"]
    assert len(results) > 2
    again = [to_json(from_json(result)) for result in results]
    assert json.dumps(again, indent=1) == json.dumps(results, indent=1)


def test_what_is_measured_is_read_as_it_was():
    measured = measure(make_layer(D, N), baselines=("reference", "dense_equal_width"))
    assert from_json(json.loads(json.dumps(to_json(measured)))) == measured


def test_the_figure_of_the_documentation_is_that_of_the_committed_results():
    results = json.loads((ROOT / "benchmarks/results/layer.json").read_text())["results"]
    figure = view.figure([from_json(result) for result in results])
    assert str(figure) == (ROOT / "docs/layer-benchmark.svg").read_text()
