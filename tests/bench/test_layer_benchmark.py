"""The layer benchmark: whole and consistent results, no report of a faulty kernel, and a limit that reads every row."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tinyexperts.bench import measurement, random_row_limit, rivals, timing, view
from tinyexperts.bench.inputs import Inputs
from tinyexperts.bench.kernel_check import check_experts, check_kernels
from tinyexperts.bench.rivals import RIVALS
from tinyexperts.bench.subjects import (
    compiled_reference_subject,
    dense_subject,
    make_layer,
    our_subject,
    reference_subject,
    settle,
)
from tinyexperts.bench.timing import Spread, interleaved, timed_after
from tinyexperts.errors import InputError
from tinyexperts.layers import PEER
from tinyexperts.ops.expert_mlp import cpu as expert_cpu
from tinyexperts.ops.expert_mlp.operator import _KERNELS as EXPERT_KERNELS
from tinyexperts.ops.product_key_topk import cpu as topk_cpu
from tinyexperts.optim import row_sparse_adam

D, N, M = 16, 64, 8
P = 8 * 8  # heads times experts: a half has 8 sub-keys only
TINY = ["bench", "layer", "--d-model", D, "--num-experts", N, "--num-tokens", 1, M, "--threads", 1, "--repeats", 1]
HAS_PEER_PYTORCH = importlib.util.find_spec("PEER_pytorch") is not None
# Torch's compiler looks at it itself, for what stands behind a break of the graph.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """One call a sample: what comes out is looked at here, and not how exact it is."""
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def spreads(value):
    """Every spread of a result, however deep."""
    if isinstance(value, dict):
        if "median" in value:
            yield value
        for child in value.values():
            yield from spreads(child)


@compiles
def test_a_tiny_run_reports_everything(run_cli, monkeypatch, tmp_path):
    # Its graphs only: what torch's compiler makes of them takes a minute, and is looked at in a test of its own.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    code, out, err = run_cli(*TINY)
    assert code == 0, err
    for heading in ("of the limit", "embedding_bag", "KiB kept/token", "dense, equal time", "runs/bench/layer.json"):
        assert heading in out
    report = json.loads((tmp_path / "runs/bench/layer.json").read_text())
    assert report["skipped"] == []
    assert report["machine"]["versions"]["torch"] == torch.__version__
    configuration = report["configuration"]
    assert (configuration["d_model"], configuration["ids"], configuration["repeats"]) == ([D], ["uniform", "zipf"], 1)
    assert configuration["rivals"] == list(RIVALS)
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
        for rival in result["rivals"].values():
            ratio = rival["forward_seconds"]["median"] / rival["our_forward_seconds"]["median"]
            assert rival["forward_ratio"]["median"] == pytest.approx(ratio)
        found = list(spreads(result))
        assert len(found) > 10
        assert all(0 < s["lower_quartile"] <= s["median"] <= s["upper_quartile"] < 1e9 for s in found)
    assert single["layer"]["steps"] == {}
    assert single["layer"]["activation_bytes_per_token"] is None
    assert all("step_ratio" not in rival for rival in single["rivals"].values())
    steps = batch["layer"]["steps"]
    assert set(steps) == {"element", "row"}
    for step in [*steps.values(), *(rival["step"] for rival in batch["rivals"].values())]:
        parts = [step[f"{name}_seconds"]["median"] for name in ("forward", "backward", "update")]
        assert step["step_seconds"]["median"] == pytest.approx(sum(parts))
    for rival in batch["rivals"].values():
        ratio = rival["step"]["step_seconds"]["median"] / rival["our_step"]["step_seconds"]["median"]
        assert rival["step_ratio"]["median"] == pytest.approx(ratio)
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
    "output of [64, 2, 16]": (expert_cpu, "expert_mlp", lambda y, pre: (y * 1.001, pre)),
    "gradient of x of": (expert_cpu, "backward_of_tokens", lambda x, w, f: (x * 1.001, w, f)),
    "gradient of the router weights": (expert_cpu, "backward_of_tokens", lambda x, w, f: (x, w + 0.1, f)),
    "gradient of the table of": (expert_cpu, "backward_of_tokens", lambda x, w, f: (x, w, f * 1.001)),
    "touched rows of": (expert_cpu, "touched_rows", lambda rows, order, starts: (rows + 1, order, starts)),
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
    "scores of the retrieval": (topk_cpu, "product_key_topk", lambda scores, ids: (scores + 0.01, ids)),
    "ids (by their scores)": (topk_cpu, "product_key_topk", lambda scores, ids: (scores, ids.flip(-1))),
    "gradient of the queries": (topk_cpu, "product_key_topk_backward", lambda query, keys: (query * 1.001, keys)),
    "gradient of the sub-keys": (topk_cpu, "product_key_topk_backward", lambda query, keys: (query, keys * 1.001)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_kernel_is_refused(run_cli, monkeypatch, tmp_path, name):
    module, attribute, spoil = FAULTS[name]
    monkeypatch.setattr(module, attribute, faulty(getattr(module, attribute), spoil))
    code, out, err = run_cli(*TINY)
    assert (code, out) == (2, "")
    (sentence,) = [line for line in err.splitlines() if "tinyexperts: " in line]
    assert sentence.startswith("tinyexperts: nothing is reported: the kernels' " + name)
    assert "differs from the reference by" in sentence
    assert not list(tmp_path.glob("runs/bench/*"))


def test_the_kernels_pass_their_check_for_other_tables():
    generator = torch.Generator().manual_seed(1)
    for num_tokens in (1, 100):
        check_kernels(make_layer(34, 1024), num_tokens, ("element", "row"), generator)
    x, weights = torch.randn(5, 34, generator=generator), torch.rand(5, 7, generator=generator)
    ids = torch.randint(100, (5, 7), generator=generator)
    for dtype in (torch.bfloat16, torch.float64):
        check_experts(
            x.to(torch.promote_types(dtype, torch.float32)),
            torch.randn(100, 2, 34).to(dtype),
            ids,
            weights,
            "gelu",
            generator,
        )


def test_without_peer_pytorch_the_rest_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "PEER_pytorch", None)
    rivals = ("dense_equal_width", "peer_pytorch_adam", "peer_pytorch_sparse_adam")
    result = measure(make_layer(D, N), rivals=rivals)
    assert list(result["rivals"]) == ["dense_equal_width"]
    assert result["left_out"] == [
        "PEER-pytorch, Adam: not installed (pip install PEER-pytorch)",
        "PEER-pytorch, SparseAdam: not installed (pip install PEER-pytorch)",
    ]


def measure(layer: PEER, *, max_bytes: float = 1e9, **options):
    return measurement.measure_setting(
        layer, num_tokens=M, threads=1, ids=("uniform",), repeats=1, max_bytes=max_bytes, **options
    )


def test_what_does_not_fit_is_left_out(run_cli, tmp_path):
    table_bytes = N * 2 * D * 4
    result = measure(make_layer(D, N), max_bytes=2.2 * table_bytes, rivals=("reference",))
    assert list(result["layer"]["steps"]) == ["row"]
    assert list(result["rivals"]["reference"]) == ["forward_seconds", "our_forward_seconds", "forward_ratio"]
    assert result["left_out"] == [
        "the step with a second moment an element: it needs 2.29e-05 GiB",
        "operators in plain torch: the training step needs 7.68e-05 GiB beside ours",
    ]
    assert "training step" in view.figure([result])
    assert len(view.tables([result])) == 3

    code, out, err = run_cli(*TINY, "--num-experts", N, 4096, "--num-tokens", M, "--max-memory-gib", "1e-4")
    assert code == 0, err
    sentence = (
        "D = 16, N = 4,096: the table with its optimiser's state needs at least 0.000977 GiB, "
        "--max-memory-gib is 0.0001"
    )
    assert f"left out: {sentence}\n" in out
    report = json.loads((tmp_path / "runs/bench/layer.json").read_text())
    assert report["skipped"] == [sentence]
    assert {result["num_experts"] for result in report["results"]} == {N}


@pytest.mark.parametrize("rivals", [[], ["dense_equal_width", "reference"]])
def test_rivals_are_chosen(run_cli, tmp_path, rivals):
    code, _, err = run_cli(*TINY, "--num-tokens", M, "--ids", "uniform", "--rivals", *rivals)
    assert code == 0, err
    (result,) = json.loads((tmp_path / "runs/bench/layer.json").read_text())["results"]
    assert list(result["rivals"]) == rivals
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


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 64, 67])
@pytest.mark.parametrize("variant", random_row_limit.VARIANTS, ids=str)
def test_the_limit_reads_every_word_of_every_row_once(variant, num_rows):
    table = torch.randn(20, 2, 26)
    words = random_row_limit.words_of(table)
    ids = torch.randint(20, (num_rows,)).numpy()
    reader = random_row_limit._READERS[variant.rows_at_once]
    expected = words[ids].sum()  # both wrap around
    assert reader(words, ids, variant.rows_ahead, variant.words_at_once, 0, num_rows) == expected
    # In two parts, as two threads read them.
    bounds = ((0, num_rows // 2), (num_rows // 2, num_rows))
    parts = [reader(words, ids, variant.rows_ahead, variant.words_at_once, *part) for part in bounds]
    assert np.array(parts).sum() == expected


def test_zipf_ids_follow_their_law():
    generator = torch.Generator().manual_seed(0)
    ids = measurement.draw_ids("zipf", 100, (1000, 64), generator)
    assert ids.dtype == torch.int64
    shares = ids.flatten().bincount(minlength=100).double().sort(descending=True).values / ids.numel()
    law = 1 / torch.arange(1, 101, dtype=torch.float64)
    torch.testing.assert_close(shares, law / law.sum(), atol=4e-3, rtol=0)
    uniform = measurement.draw_ids("uniform", 100, (1000, 64), generator).flatten().bincount(minlength=100)
    assert len(uniform) == 100
    assert uniform.min() > 500


def test_calls_take_turns_and_short_ones_are_repeated(monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.018)
    order = []

    def call(name: str, seconds: float):
        def run():
            order.append(name)
            return seconds, 2 * seconds

        return run

    times = interleaved({"a": call("a", 1.0), "b": call("b", 0.002)}, repeats=3)
    assert "".join(order) == "aabb" + 3 * ("a" + 3 * "b")
    assert times["a"].tolist() == 3 * [[1.0, 2.0]]
    assert times["b"] == pytest.approx(np.full((3, 2), (0.002, 0.004)))
    spread = Spread.of(np.array([1.0, 5.0, 2.0, 3.0, 4.0]))
    assert (spread.lower_quartile, spread.median, spread.upper_quartile) == (2, 3, 4)


def test_the_reference_shares_the_table_and_takes_the_same_step():
    layer = make_layer(D, N)
    x, grad_y = torch.randn(M, D), torch.randn(M, D)
    ours = our_subject(layer, "row")
    settle(ours, x, grad_y)
    router = {name: value.clone() for name, value in layer.router.state_dict().items()}
    before = layer.experts.detach().clone()
    twin = reference_subject(ours)
    twin.step(x, grad_y)
    assert "cpu" in EXPERT_KERNELS
    by_reference = layer.experts.detach().clone()
    assert not torch.equal(by_reference, before)
    torch.testing.assert_close(layer.router.state_dict(), router)  # the router is its own
    with torch.no_grad():
        layer.experts.copy_(before)
    for moments in ours.optimizers[0].state.values():
        for moment in moments.values():
            moment.zero_() if moment.dim() else moment.fill_(1)
    ours.step(x, grad_y)
    torch.testing.assert_close(layer.experts.detach(), by_reference)


@compiles
def test_the_compiled_reference_is_the_layer_and_shares_its_table():
    layer = make_layer(D, N)
    x, grad_y = torch.randn(M, D), torch.randn(M, D)
    rival = compiled_reference_subject(layer)
    (table,) = [p for p in rival.module.parameters() if p.dim() == 3 and p.shape[0] == N]
    assert table.data_ptr() == layer.experts.data_ptr()
    torch.testing.assert_close(rival.forward(x), layer(x))
    before = layer.experts.detach().clone()
    y = layer(x)
    y.backward(grad_y)
    touched = layer.experts.grad.coalesce().indices()[0]
    rival.step(x, grad_y)
    moved = (layer.experts.detach() != before).flatten(1).any(1).nonzero()[:, 0]
    assert torch.equal(moved, touched)


def test_prepared_calls_leave_the_preparation_out_of_the_clock(monkeypatch):
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    order = []
    call = timed_after(lambda: order.append("prepared") or 7, lambda value: order.append(value))
    assert call() == (2.5,)
    assert order == ["prepared", 7]


def test_kept_bytes_are_those_of_a_dense_layer():
    x = torch.randn(M, D)
    # The tokens, and the hidden neurons before and after their activation.
    assert dense_subject(D, 32).activation_bytes(x[:M]) == M * (D + 32 + 32) * 4


def test_the_width_of_equal_time_is_found(monkeypatch):
    class Sleeper:
        """A layer whose step takes the seconds that it is told."""

        def __init__(self, seconds):
            self.seconds = seconds

        def step_of(self, inputs):
            return lambda: (self.seconds, 0.0, 0.0)

    monkeypatch.setattr(rivals, "dense_subject", lambda d_model, hidden_dim: Sleeper(hidden_dim / 1000))
    inputs = Inputs(M, D, trains=True, generator=torch.Generator())
    for seconds, hidden_dim in ((0.001, 16), (0.5, 512), (1.2, 1216), (1000.0, 1 << 16)):
        found = rivals._hidden_dim_of_equal_time(Sleeper(seconds), inputs)
        assert hidden_dim <= found <= 1.1 * hidden_dim


def test_without_a_compiler_the_rest_is_measured(monkeypatch):
    def fail(self):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    subject = compiled_reference_subject(make_layer(D, N))
    monkeypatch.setattr(rivals, "compiled_reference_subject", lambda layer: subject)
    monkeypatch.setattr(type(subject), "forward", lambda self, x: fail(self) if self is subject else self.module(x))
    result = measure(make_layer(D, N), rivals=("compiled_reference", "dense_equal_width"))
    assert list(result["rivals"]) == ["dense_equal_width"]
    told = "torch.compile failed (InvalidCxxCompiler: No working C++ compiler found)"
    assert result["left_out"] == [f"reference, torch.compile: {told}"]


def test_the_goals_of_the_readme_are_measured(monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks/cpu_layer.py"
    spec = importlib.util.spec_from_file_location("cpu_layer", path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cpu_layer", script)
    spec.loader.exec_module(script)
    sizes = script.Sizes(
        d_model=D, num_experts=N, wide_d_model=32, wide_num_experts=N, few_experts=16, many_experts=256, num_tokens=M
    )
    stages = []
    measured, results = script.measure_goals(sizes, repeats=1, on_stage=stages.append)
    by_peer_pytorch = {"forward", "one_token", "step", "wide_step", "activations"}
    assert set(measured) == set(script.GOALS) - (set() if HAS_PEER_PYTORCH else by_peer_pytorch)
    assert [result["num_tokens"] for result in results] == [M, 1, M]
    assert results[2]["d_model"] == 32
    assert len(stages) > 8
    lines = script.report_of({"share": {"median": 0.9}, "many_experts": {"median": 2.0}})
    assert [line["reached"] for line in lines[:2]] == ["must", "not measured"]
    assert lines[5]["reached"] == "aim"
    assert script.table_of(measured).row_count == len(script.GOALS)


def test_peer_pytorch_is_none_of_the_dependencies():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert "peer-pytorch" not in text.lower()


def test_a_difference_is_told_with_its_size():
    generator = torch.Generator().manual_seed(0)
    x, table, ids = torch.randn(3, D), torch.randn(N, 2, D), torch.randint(N, (3, 5))
    weights = torch.full((3, 5), float("nan"))
    with pytest.raises(InputError, match=r"the kernels' output of \[64, 2, 16\] .* by nan of its largest element"):
        check_experts(x, table, ids, weights, "gelu", generator)
