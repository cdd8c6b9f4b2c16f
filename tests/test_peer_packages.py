"""benchmarks/peer_packages.py: planted faults of retrieval are seen, FLOPs agree, tables show what was measured."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path

import peer_packages
import pytest
import torch
from peer_package_parts import exactness, facts, pairs, step_memory, tables
from peer_package_parts.layers import (
    Foreign,
    Sizes,
    imported,
    peer_pytorch,
    peer_pytorch_started_as_ours,
    product_key_memory,
)
from torch.utils.flop_counter import FlopCounterMode

from tinyexperts import PEER
from tinyexperts.bench import timing
from tinyexperts.errors import InputError

QUICK = {name: part.quick for name, part in peer_packages.PARTS.items()}
SIZES = Sizes(d_model=24, num_experts=81, num_heads=3, experts_per_head=4, query_dim=10)
THEIRS = {
    "peer": lambda: peer_pytorch(SIZES, non_competing_scores=False),
    "default": lambda: peer_pytorch(SIZES),
    "memory": lambda: product_key_memory(SIZES),
}


def silent(_):
    pass


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The files of what is quick, and what the command printed."""
    folder = tmp_path_factory.mktemp("measured")
    parts = ("exactness", "speed", "memory")
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text):
        patch.setattr(timing, "_SAMPLE_SECONDS", 0)
        patch.setattr(sys, "argv", ["peer_packages", "--quick", "--output", str(folder), "--parts", *parts])
        peer_packages.main()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f"{name}.json" for name in parts), "tables.md"])
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in parts}, folder, text.getvalue()


def test_exact_retrieval_is_all_of_the_true_topk_and_their_default_one_of_k(measured):
    for found in measured[0]["exactness"]["results"]:
        shares = list(found["shares"].values())
        if found["layer"] == "PEER-pytorch, default":
            assert shares == [1 / found["k"]] * 3
        elif "product_key_topk" in found["layer"]:
            assert max(shares) < 1
        else:
            assert shares == [1.0] * 3, found


def opened(candidate, kind="random", k=4, num_experts=256):
    """A layer, and its retrieval of some tokens."""
    sizes = Sizes(d_model=24, num_experts=num_experts, num_heads=3, experts_per_head=k, query_dim=8)
    layer = candidate.make(sizes)
    x_MD = exactness.draw_keys_and_queries(layer, sizes, kind, 6, seed=0)
    with torch.no_grad():
        return layer, x_MD, candidate.open(layer, x_MD)


@pytest.mark.parametrize("candidate", exactness.CANDIDATES, ids=lambda candidate: candidate.label)
def test_queries_and_ids_are_those_that_the_layer_uses(candidate):
    layer, x_MD, found = opened(candidate)
    half = found.sub_keys.shape[-1]
    scores_MHP = torch.stack(
        [
            torch.einsum("mhc,mhkc->mhk", found.query[..., part], keys)
            for part, keys in (
                (slice(half), found.sub_keys[torch.arange(3)[:, None], 0, found.ids // 16]),
                (slice(half, None), found.sub_keys[torch.arange(3)[:, None], 1, found.ids % 16]),
            )
        ]
    ).sum(0)
    if candidate.open is exactness.of_ours:
        torch.testing.assert_close(scores_MHP, layer.route(x_MD).scores)
    else:  # the function of the scores is given what the layer computed
        given = []
        function = layer.score_activation if hasattr(layer, "score_activation") else layer.gate_activation
        function.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
        with torch.no_grad():
            layer(x_MD[None])
        torch.testing.assert_close(scores_MHP, given[0].view(scores_MHP.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", exactness.QUERIES)
@pytest.mark.parametrize(
    ("fault", "at_most"),
    [
        ("the stride is k, and not S", 0.6),
        ("places among the candidates", 0.3),
        ("the best one k times", 0.25),
        ("one missing", 0.75),
        ("one of all too low", 0.999),
    ],
)
def test_a_planted_inexact_retrieval_is_seen(fault, at_most, kind):
    _, _, found = opened(exactness.CANDIDATES[3], kind)
    assert exactness.share_of_true_topk(found, 4) == 1
    ids = found.ids.clone()
    if fault.startswith("the stride"):
        ids = ids // 16 * 4 + ids % 16
    elif fault.startswith("places"):
        ids = torch.arange(4).expand_as(ids)
    elif fault.startswith("the best"):
        ids = ids[..., :1].expand_as(ids)
    elif fault.startswith("one missing"):
        ids = ids[..., :3]
    else:
        whole = (
            torch.einsum("hc,hsc->hs", found.query[2, :, :4], found.sub_keys[:, 0])[:, :, None]
            + torch.einsum("hc,hsc->hs", found.query[2, :, 4:], found.sub_keys[:, 1])[:, None]
        ).flatten(1)
        ids[2, 1, 3] = whole[1].argmin()
    faulty = exactness.Retrieval(query=found.query, sub_keys=found.sub_keys, ids=ids)
    assert exactness.share_of_true_topk(faulty, 4) <= at_most


def test_any_choice_among_ties_is_right_and_no_lower_score_is():
    query = torch.ones(1, 1, 2)
    sub_keys = torch.tensor([[[[3.0], [1.0], [1.0]], [[0.0], [0.0], [-1.0]]]])  # scores: 3 3 2, 1 1 0, 1 1 0
    for ids, share in (((0, 1, 2, 7), 1), ((2, 1, 0, 3), 1), ((0, 1, 2, 5), 3 / 4), ((8, 5, 3, 4), 2 / 4)):
        found = exactness.Retrieval(query=query, sub_keys=sub_keys, ids=torch.tensor([[ids]]))
        assert exactness.share_of_true_topk(found, 4) == share, ids


@pytest.mark.parametrize("theirs", THEIRS)
def test_a_pair_with_other_weights_is_refused(theirs):
    torch.manual_seed(0)
    layer, x_MD = THEIRS[theirs](), torch.randn(9, 24)
    ours = pairs.ours_of(layer)
    pairs.check_equal(pairs.foreign(layer, ours), ours.module, x_MD)
    with torch.no_grad():
        ours.module.experts.mul_(1.02)
    with pytest.raises(AssertionError):
        pairs.check_equal(pairs.foreign(layer, ours), ours.module, x_MD)


def test_every_pair_is_timed(measured):
    results = measured[0]["speed"]["results"]
    layers = [f"{name}; {kind}" for name in pairs.THEIRS for kind in ("AdamW", "SparseAdam")]
    layers.insert(2, pairs.DENSE)
    assert [(found["layer"], found["num_tokens"]) for found in results] == [
        (name, m) for name in layers for m in (1, 8)
    ]
    for found in results:
        for kind in ("forward", "step"):  # one round: the ratio is that of the seconds
            seconds, ours = (found[kind][name]["median"] for name in ("seconds", "our_seconds"))
            assert found[kind]["ratio"]["median"] == pytest.approx(seconds / ours)
            assert 0 < seconds < 10


def test_a_sparse_step_of_theirs_is_that_of_sparse_adam_and_moves_touched_rows_alone():
    torch.manual_seed(0)
    theirs = THEIRS["peer"]()
    before = copy.deepcopy(theirs)
    contestant = pairs.with_sparse_adam(Foreign(theirs, imported(theirs)))
    x_MD = torch.randn(2, 24)
    touched = set(imported(before).route(x_MD).ids.flatten().tolist())
    pairs.settle(contestant, x_MD, torch.ones(2, 24))
    moved = (theirs.weight_up_embed.weight != before.weight_up_embed.weight).any(1)
    assert set(moved.nonzero()[:, 0].tolist()) <= touched  # GELU is exactly 0 for a few of the retrieved ones
    assert len(touched) / 2 < moved.sum() <= len(touched) < 81
    assert not torch.equal(theirs.keys, before.keys)
    assert len(pairs.state_tensors(contestant)) == 2 * 2 + 3 * 2  # SparseAdam counts steps by a number


def test_memory_is_that_of_the_tensors(measured):
    found = {each["layer"]: each for each in measured[0]["memory"]["results"]}
    router = 16 * 2 * 8 + 2 * 16 * 8
    for label, num_vectors in (("PEER-pytorch, softmax of K", 2), ("product-key-memory", 1)):
        norm = 8 if num_vectors == 1 else 0
        ours, theirs = found[f"tinyexperts, as {label}"], found[f"{label}; AdamW"]
        for each in (ours, theirs):
            assert each["weights_bytes"] == 4 * (256 * num_vectors * 16 + router + norm)
            assert 0 <= each["state_bytes"] - 2 * each["weights_bytes"] <= 64
        assert ours["activation_bytes_per_token"] < theirs["activation_bytes_per_token"]
        kinds = [found[name]["table_gradient"] for name in (ours["layer"], theirs["layer"], f"{label}; SparseAdam")]
        assert kinds == ["sparse", "dense", "sparse"]
    # The rows that PEER-pytorch gathers are kept: two vectors of each expert of a token.
    rows = 2 * 2 * 4 * 16 * 4
    assert rows < found["PEER-pytorch, softmax of K; AdamW"]["activation_bytes_per_token"] < 2.5 * rows


def test_the_peak_of_a_step_counts_what_is_taken_and_freed():
    mib = 2**20
    peak = step_memory._peak_of(lambda: torch.ones(64 * mib // 4).sum().item())
    assert 63 * mib < peak < 80 * mib


@pytest.mark.parametrize("theirs", THEIRS)
def test_the_flops_of_their_layers_are_those_that_torch_counts(theirs):
    layer = THEIRS[theirs]()
    foreign = Foreign(layer, imported(layer))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        foreign(torch.randn(1, 7, 24))
    flops = foreign.flops_per_token()
    # torch counts no embedding_bag, which reads the values: two FLOPs a number.
    uncounted = 2 * 3 * 4 * 24 if theirs == "memory" else 0
    assert counter.get_total_flops() == 7 * (flops.total - uncounted)


@pytest.fixture(scope="module")
def fact_data(tmp_path_factory):
    """The data set of the quick runs."""
    folder = tmp_path_factory.mktemp("facts") / "data"
    facts.prepare_facts(QUICK["facts"], folder)
    return folder


def test_every_method_spends_the_same_training_flops(fact_data):
    config = QUICK["facts"]
    runs = {name: facts.make_model_run(config, fact_data, name, 1e-3, 0) for name in facts.METHODS}
    for run in runs.values():
        spent = run.num_steps * run.flops_per_step
        assert config.training_flops - run.flops_per_step < spent <= config.training_flops
        assert run.flops_per_step == 3 * run.model.flops_per_token(64) * 2 * 64
    assert runs["peer"].flops_per_step == runs["peer-pytorch"].flops_per_step
    assert runs["product-key-memory"].flops_per_step == runs["their-product-key-memory"].flops_per_step


@pytest.mark.parametrize("name", facts.METHODS)
def test_each_parameter_is_trained_once_at_its_rate(fact_data, name):
    run = facts.make_model_run(QUICK["facts"], fact_data, name, 0.0625, 0)
    rates = {}
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert parameter not in rates
                rates[parameter] = group["peak_lr"]
    assert set(rates) == set(run.model.parameters())
    layer = run.model.blocks[2].feed_forward
    found = {name: rates[parameter] for name, parameter in layer.named_parameters()}
    ours = dict.fromkeys(found, 4e-3) | {"experts": 0.0625}
    theirs = dict.fromkeys(found, 0.0625) | {"theirs.values.weight": 0.625}
    assert found == {key: (ours if "experts" in found else theirs)[key] for key in found}


def test_a_layer_of_theirs_that_starts_as_ours_has_weights_of_our_sizes():
    torch.manual_seed(0)
    sizes = Sizes(d_model=24, num_experts=1024, num_heads=3, experts_per_head=4, query_dim=10)
    theirs = imported(peer_pytorch_started_as_ours(sizes))
    ours = PEER(24, 1024, num_heads=3, experts_per_head=4, query_dim=10, shared_sub_keys=False)
    for their, our in zip(theirs.experts.unbind(1), ours.experts.unbind(1), strict=True):
        assert their.std().item() == pytest.approx(our.std().item(), rel=0.02)
    their, our = (layer.router.query.weight.std().item() for layer in (theirs, ours))
    assert their == pytest.approx(our, rel=0.1)
    torch.testing.assert_close(theirs.router.sub_keys.norm(dim=-1), ours.router.sub_keys.norm(dim=-1))


def test_rates_are_tried_until_the_best_is_at_no_end():
    def runs_of(losses):
        asked = []

        def run(rate):
            asked.append(rate)
            return {"rate": rate, "nats_per_fact": losses(rate)}

        return [each["rate"] for each in facts._tuned(1.0, run)], asked

    assert runs_of(lambda rate: abs(math.log(rate)))[0] == [1 / 4, 1, 4]
    assert runs_of(lambda rate: rate) == ([1 / 64, 1 / 16, 1 / 4, 1, 4], [1 / 4, 1, 4, 1 / 16, 1 / 64])
    assert runs_of(lambda rate: None if rate > 4 else -rate)[0] == [1 / 4, 1, 4, 16]


def test_runs_that_are_there_are_kept_and_runs_of_other_sizes_refused(monkeypatch, tmp_path):
    chosen = ("dense", "their-product-key-memory")
    monkeypatch.setattr(facts, "METHODS", {name: facts.METHODS[name] for name in chosen})
    monkeypatch.setattr(facts, "_MAX_RATES", 3)
    found = facts.measure(QUICK["facts"], tmp_path, silent)
    for name in chosen:
        assert [run["seed"] for run in found[name]["runs"]] == [0, 1]
        assert [run["rate"] for run in found[name]["tuning"]] == [facts.METHODS[name].rate * by for by in (1 / 4, 1, 4)]
        best = min(found[name]["tuning"], key=lambda run: run["nats_per_fact"])
        assert {run["rate"] for run in found[name]["runs"]} == {best["rate"]}
        assert 0 < found[name]["runs"][0]["loss"] < math.log(300)  # a little is learned
    monkeypatch.setattr(facts, "train_run", None)
    assert facts.measure(QUICK["facts"], tmp_path, silent) == found
    with pytest.raises(InputError, match="other sizes"):
        facts.measure(peer_packages.PARTS["facts"].config, tmp_path, silent)


def test_a_run_depends_on_its_seed_alone(fact_data):
    runs = [facts.train_run(QUICK["facts"], fact_data, "peer-pytorch", 1e-3, seed) for seed in (0, 0, 1)]
    losses = [run["loss"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def fact_run(seed, nats, rate=1e-3, **changes):
    sizes = {"num_steps": 10, "training_flops": 6e11, "active_parameters": 1000, "total_parameters": 2000}
    return {"seed": seed, "rate": rate, "nats_per_fact": nats, "recall": 0.5, "loss": 1.5} | sizes | changes


def test_the_table_of_facts_has_means_and_paired_differences():
    peer = {"tuning": [fact_run(9, 5.0)], "runs": [fact_run(0, 4.0), fact_run(1, 6.0)]}
    theirs = {
        "tuning": [fact_run(9, None, 4e-3), fact_run(9, 7.25)],
        "runs": [fact_run(0, 5.0, recall=0.25), fact_run(1, 9.0)],
    }
    cells = tables.facts_table({"peer": peer, "peer-pytorch": theirs}).splitlines()[-1].split(" | ")
    assert cells[1] == "the layer: 0.004 (diverged) **0.001 (7.25)**"
    assert cells[5] == "7.00 ± 2.83"
    half = 12.706204736 * math.sqrt(2) / math.sqrt(2)  # Student's factor for two seeds; differences 1 and 3
    assert cells[6] == f"+2.00 (\N{MINUS SIGN}{half - 2:.2f} to +{half + 2:.2f})"
    assert cells[7].startswith("37.5 ±")


def test_the_tables_show_the_numbers_of_the_files(measured, tmp_path):
    files, folder, shown = measured
    assert shown.strip() == (folder / "tables.md").read_text().strip() == peer_packages.tables_of(folder).strip()
    files = copy.deepcopy(files)
    assert all(file["machine"]["peers"]["product-key-memory"] == "0.3.0" for file in files.values())
    step = files["speed"]["results"][0]["step"]
    step["ratio"]["median"], step["seconds"]["median"], step["our_seconds"]["median"] = 77.125, 1.5, 0.00025
    files["exactness"]["results"][0]["shares"]["ties"] = 0.875
    files["memory"]["results"][0]["activation_bytes_per_token"] = 12.5 * 1024
    for name, file in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(file))
    text = peer_packages.tables_of(tmp_path)
    assert "| **77.12**" in text
    assert "; 1,500 / 0.25 |" in text
    assert "| 100 / 87.5 / 100 % |" in text
    assert "| 12.5 |" in text
    assert "Known facts" not in text


def test_a_folder_of_other_facts_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "facts-config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["peer_packages", "--quick", "--output", str(tmp_path), "--parts", "facts"])
    with pytest.raises(SystemExit) as stop:
        peer_packages.main()
    assert stop.value.code == 2
    assert "give another --output" in capsys.readouterr().err


def test_the_page_has_the_tables_of_the_files():
    root = Path(__file__).parents[1]
    page = (root / "docs/results/peer-packages.md").read_text()
    lines = peer_packages.tables_of(root / "benchmarks/results/peer_packages").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 40
    assert [line for line in page.splitlines() if line.startswith("|")] == rows
