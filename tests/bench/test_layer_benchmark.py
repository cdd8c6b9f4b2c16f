"""The command: whole and consistent results, no report of a faulty kernel, bad input in one sentence."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef

from tinyexperts.bench.baselines import BASELINES
from tinyexperts.bench.contestants import make_layer
from tinyexperts.ops.expert_mlp import cpu as expert_cpu
from tinyexperts.ops.expert_mlp import operator as expert_operator
from tinyexperts.ops.product_key_topk import operator as topk_operator
from tinyexperts.optim import row_sparse_adam

D, N, M = 16, 64, 8
P = 8 * 8  # heads times experts: a half has 8 sub-keys only
TINY = ["bench", "layer", "--d-model", D, "--num-experts", N, "--num-tokens", 1, M, "--threads", 1, "--repeats", 1]
HAS_PEER_PYTORCH = importlib.util.find_spec("PEER_pytorch") is not None


def spreads(value):
    """Yield every spread of a result, however deep."""
    if isinstance(value, dict):
        if "median" in value:
            yield value
        for child in value.values():
            yield from spreads(child)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_tiny_run_reports_everything(run_cli, monkeypatch, tmp_path):
    # Its graphs only: what torch's compiler makes of them takes a minute, and is looked at in a test of its own.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    code, out, err = run_cli(*TINY)
    assert code == 0, err
    headings = "of the limit", "embedding_bag", "KiB kept/token", "dense, equal time"
    for heading in (*headings, "measured with numba kernels", "runs/bench/layer.json"):
        assert heading in out
    report = json.loads((tmp_path / "runs/bench/layer.json").read_text())
    assert report["skipped"] == []
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["machine"]["kernels"] == "numba kernels"
    configuration = report["configuration"]
    assert (configuration["d_model"], configuration["ids"], configuration["repeats"]) == ([D], ["uniform", "zipf"], 1)
    assert configuration["rivals"] == list(BASELINES)
    single, batch = report["results"]
    for result, num_tokens in ((single, 1), (batch, M)):
        assert [result[key] for key in ("d_model", "num_experts", "num_tokens", "threads")] == [D, N, num_tokens, 1]
        assert list(result["operator"]) == ["uniform", "zipf"]
        for operator in result["operator"].values():
            assert operator["bytes"] == num_tokens * P * 2 * D * 4
            assert operator["flops"] == 4 * num_tokens * P * D
            share = operator["gb_per_second"] / operator["limit_gb_per_second"]
            assert operator["share_of_limit"]["median"] == pytest.approx(share)
            assert operator["limit_gb_per_second"] == max(operator["limit_gb_per_second_by_variant"].values())
            ratio = operator["embedding_bag_forward_seconds"]["median"] / operator["values_forward_seconds"]["median"]
            assert operator["embedding_bag_forward_ratio"]["median"] == pytest.approx(ratio)
        layer = make_layer(D, N)
        measured = result["layer"]
        for part, share in measured["forward_shares"].items():
            seconds = [measured[f"{name}forward_seconds"]["median"] for name in (f"{part}_", "")]
            assert share["median"] == pytest.approx(seconds[0] / seconds[1])
        assert list(measured["forward_shares"]) == ["router", "topk", "experts"]
        assert result["layer"]["forward_flops"] == num_tokens * layer.flops_per_token().total
        assert 0 < result["layer"]["touched_rows"] <= min(N, num_tokens * P)
        assert result["rivals"]["dense_equal_width"]["hidden_dim"] == P
        assert result["rivals"]["dense_equal_time"]["hidden_dim"] % 16 == 0
        assert {"reference", "compiled_reference", "dense_equal_width", "dense_equal_time"} <= set(result["rivals"])
        assert ("peer_pytorch_adam" in result["rivals"]) == HAS_PEER_PYTORCH
        assert bool(result["left_out"]) != HAS_PEER_PYTORCH
        for baseline in result["rivals"].values():
            ratio = baseline["forward_seconds"]["median"] / baseline["our_forward_seconds"]["median"]
            assert baseline["forward_ratio"]["median"] == pytest.approx(ratio)
        found = list(spreads(result))
        assert len(found) > 10
        assert all(0 < s["lower_quartile"] <= s["median"] <= s["upper_quartile"] < 1e9 for s in found)
    assert single["layer"]["steps"] == {}
    assert single["layer"]["activation_bytes_per_token"] is None
    assert all("step_ratio" not in baseline for baseline in single["rivals"].values())
    steps = batch["layer"]["steps"]
    assert set(steps) == {"element", "row"}
    for step in [*steps.values(), *(baseline["step"] for baseline in batch["rivals"].values())]:
        parts = [step[f"{name}_seconds"]["median"] for name in ("forward", "backward", "update")]
        assert step["step_seconds"]["median"] == pytest.approx(sum(parts))
    for baseline in batch["rivals"].values():
        ratio = baseline["step"]["step_seconds"]["median"] / baseline["our_step"]["step_seconds"]["median"]
        assert baseline["step_ratio"]["median"] == pytest.approx(ratio)
    touched, step_bytes = batch["layer"]["touched_rows"], batch["layer"]["step_bytes"]
    assert step_bytes["element"] - step_bytes["row"] == 2 * touched * 2 * (D - 1) * 4
    assert batch["layer"]["step_flops"] == 3 * batch["layer"]["forward_flops"]
    # Tokens, queries before and after their norm, ids, router weights and pre-activations; the norm's vectors besides.
    kept = D * 4 + 2 * 8 * 128 * 4 + P * (8 + 4 + 4)
    assert kept <= batch["layer"]["activation_bytes_per_token"] <= kept + 4 * (8 * 128 * 4) / M
    assert batch["rivals"]["reference"]["activation_bytes_per_token"] >= kept
    if sys.platform == "linux":
        assert batch["layer"]["peak_resident_bytes"] > 5e7
    drawing = (tmp_path / "runs/bench/layer.svg").read_text()
    root = ET.fromstring(drawing)
    assert root.get("aria-label").startswith("Line charts: milliseconds against the number of experts, 8 tokens")
    assert "training step, D = 16, M = 8" in drawing


def faulty(function, spoil):
    def wrong(*arguments, **options):
        result = function(*arguments, **options)
        return spoil(*arguments) if result is None else spoil(*result)

    return wrong


FAULTS = {
    "output of [64, 2, 16]": (expert_operator, "_expert_mlp", lambda y, pre: (y * 1.001, pre)),
    "gradient of x of": (expert_operator, "_expert_mlp_backward", lambda x, w, f: (x * 1.001, w, f)),
    "gradient of the router weights": (expert_operator, "_expert_mlp_backward", lambda x, w, f: (x, w + 0.1, f)),
    "gradient of the table of": (expert_operator, "_expert_mlp_backward", lambda x, w, f: (x, w, f * 1.001)),
    "touched rows of": (expert_cpu, "find_touched_rows", lambda rows, order, starts: (rows + 1, order, starts)),
    "table in the fused step (second moment a element)": (
        row_sparse_adam,
        "row_adam_fused_",
        lambda table, *rest: table.mul_(1.001),
    ),
    "second moment in the fused step": (
        row_sparse_adam,
        "row_adam_fused_",
        lambda table, first, second, *rest: second.fill_(float("nan")),
    ),
    "scores of the retrieval": (topk_operator, "_product_key_topk", lambda scores, ids: (scores + 0.01, ids)),
    "ids (by their scores)": (topk_operator, "_product_key_topk", lambda scores, ids: (scores, ids.flip(-1))),
    "gradient of the queries": (topk_operator, "_product_key_topk_backward", lambda query, keys: (query * 1.001, keys)),
    "gradient of the sub-keys": (
        topk_operator,
        "_product_key_topk_backward",
        lambda query, keys: (query, keys * 1.001),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_kernel_is_refused(run_cli, monkeypatch, tmp_path, name):
    module, attribute, spoil = FAULTS[name]
    function = getattr(module, attribute)
    if isinstance(function, CustomOpDef):
        monkeypatch.setitem(function._backend_fns, "cpu", faulty(function._backend_fns["cpu"], spoil))
    else:
        monkeypatch.setattr(module, attribute, faulty(function, spoil))
    code, out, err = run_cli(*TINY)
    assert (code, out) == (2, "")
    (sentence,) = [line for line in err.splitlines() if "tinyexperts: " in line]
    assert sentence.startswith("tinyexperts: nothing is reported: the kernels' " + name)
    assert "differs from the reference by" in sentence
    assert not list(tmp_path.glob("runs/bench/*"))


def test_a_table_that_does_not_fit_is_left_out(run_cli, tmp_path):
    only = ["--num-tokens", M, "--ids", "uniform", "--baselines", "dense_equal_width"]
    code, out, err = run_cli(*TINY, *only, "--num-experts", N, 4096, "--max-memory-gib", "1e-4")
    assert code == 0, err
    sentence = (
        "D = 16, N = 4,096: the table with its optimizer's state needs at least 0.000977 GiB, "
        "--max-memory-gib is 0.0001"
    )
    assert f"left out: {sentence}\n" in out
    report = json.loads((tmp_path / "runs/bench/layer.json").read_text())
    assert report["skipped"] == [sentence]
    assert {result["num_experts"] for result in report["results"]} == {N}


@pytest.mark.parametrize("baselines", [[], ["dense_equal_width", "reference"]])
def test_baselines_are_chosen(run_cli, tmp_path, baselines):
    code, _, err = run_cli(*TINY, "--num-tokens", M, "--ids", "uniform", "--baselines", *baselines)
    assert code == 0, err
    (result,) = json.loads((tmp_path / "runs/bench/layer.json").read_text())["results"]
    assert list(result["rivals"]) == baselines
    assert result["left_out"] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--d-model", 15], "--d-model must be even"),
        (["--d-model", 0], "--d-model must be one or more numbers of at least 1, got (0,)"),
        (["--num-experts", 60], "--num-experts must be squares (product keys are pairs), got 60"),
        (["--num-tokens", 0], "--num-tokens must be one or more numbers of at least 1, got (0,)"),
        (["--threads", -1], "--threads must be one or more numbers of at least 1, got (-1,)"),
        (["--repeats", 0], "--repeats must be at least 1, got 0"),
        (["--max-memory-gib", 0], "--max-memory-gib must be positive, got 0"),
        (["--max-memory-gib", "1e-6"], "nothing is measured: D = 16, N = 64: the table with its"),
        (["--output", "taken"], "taken"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run_cli, tmp_path, arguments, sentence):
    (tmp_path / "taken").write_text("")
    code, out, err = run_cli(*TINY, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tinyexperts: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_other_ids_and_no_verb_are_refused_by_the_parser(run_cli):
    for arguments, name in (([*TINY, "--ids", "normal"], "--ids"), (["bench"], "layer")):
        code, out, err = run_cli(*arguments)
        assert code == 2
        assert name in out + err
        assert "Traceback" not in out + err
