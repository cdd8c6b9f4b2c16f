"""A study's report: verdicts, tables and figures from run folders with losses that are known."""

from __future__ import annotations

import csv
import math
import re
import shlex
import shutil
import statistics
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import tyro
from study_folder import fill

from tinyexperts.comparison.figures import training_curves
from tinyexperts.comparison.findings import verdict_on
from tinyexperts.comparison.frame import HELD_OUT
from tinyexperts.errors import InputError
from tinyexperts.planning.model_costs import account
from tinyexperts.report.numbers import MISSING
from tinyexperts.report.table import Table
from tinyexperts.statistics.seed_interval import SeedInterval
from tinyexperts.study.all_studies import STUDIES
from tinyexperts.study.analysis.frame import read_runs
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.scales import scale_named
from tinyexperts.study.studies.ablation import Ablation
from tinyexperts.study.studies.isoflop import ISOFLOP
from tinyexperts.study.studies.isoflop.analysis import IsoFlopAnalysis
from tinyexperts.study.studies.isoflop.figures import difference_trend, residuals
from tinyexperts.study.studies.isoflop.tables import isoflop_tables
from tinyexperts.study.studies.num_experts import NUM_EXPERTS
from tinyexperts.study.studies.optimizer import OPTIMIZER
from tinyexperts.study.studies.placement import PLACEMENT
from tinyexperts.study.study import Study
from tinyexperts.study.study_report import write_study_report
from tinyexperts.study.train_command import train_command
from tinyexperts.training import TrainConfig, recipes
from tinyexperts.training.config import CheckpointConfig, OptimizerConfig
from tinyexperts.training.recipes import RECIPES

# Per method: by how much it is better than dense at any budget, in nats, and how far apart its seeds are.
ADVANTAGE = {"dense": 0.0, "moe": 0.03, "pkm": 0.05, "peer": 0.05}
NOISE = {0: -0.004, 1: 0.001, 2: 0.003}


def isoflop_loss(run):
    """A parabola in the width's logarithm, falling with the budget; wobbling seeds."""
    budget, seed = run.axes["budget"], run.axes["seed"]
    optimum = 55 * (budget / 1e13) ** 0.05
    own = 0.2 * (-1) ** seed if run.method == "moe" else 0.0  # so uneven that nothing can be said
    curve = 0.3 * math.log(run.axes["width"] / optimum) ** 2
    return 6 - 0.2 * math.log10(budget) + curve - ADVANTAGE.get(run.method, 0.0) + NOISE[seed] + own


@pytest.fixture(scope="module")
def isoflop(tmp_path_factory):
    """A study with one failed run, whose reason has characters that HTML must escape."""
    failed = "peer-d96-c3e13-seed2"
    folder = fill(
        tmp_path_factory.mktemp("isoflop") / "study", ISOFLOP, isoflop_loss, corpora=("texts/poems",),
        skip=(failed,),
    )  # fmt: skip
    folder.note_failure(failed, "<script>alert(1)</script> & more", diverged=True)
    return folder


@pytest.fixture(scope="module")
def isoflop_page(isoflop):
    """The page of its report, written together with the tables."""
    return write_study_report(ISOFLOP, isoflop, command="tinyexperts study isoflop")


@pytest.fixture(scope="module")
def runs(isoflop):
    """Its runs, read once; tests replace what they change."""
    return read_runs(isoflop)


@pytest.fixture(scope="module")
def analysis(runs):
    return IsoFlopAnalysis(runs)


@pytest.fixture(scope="module")
def of_peer(runs):
    """The analysis of PEER's runs alone, with one law: a fit takes a second."""
    return IsoFlopAnalysis(replace(runs, frame=runs.frame[runs.frame.method == "peer"]))


def rows_of(folder, name):
    with (folder.path / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_verdicts_follow_the_intervals(analysis):
    claims = {claim.text: claim for claim in analysis.claims()}
    for budget in ("3e+12", "1e+13", "3e+13"):
        against_dense = claims[f"At {budget} FLOPs PEER reaches a lower loss than dense"]
        assert against_dense.verdict == "reproduced"
        assert "\N{MINUS SIGN}0.050 nats, 95 % interval" in against_dense.evidence
        assert claims[f"At {budget} FLOPs PEER reaches a lower loss than MoE"].verdict == "can't tell"
        assert claims[f"At {budget} FLOPs PEER reaches a lower loss than PKM"].verdict == "can't tell"


def without(runs, is_out, state):
    """The runs, of which some are in another state, their results unknown."""
    frame = runs.frame.copy()
    frame.loc[is_out, "state"] = state
    return replace(runs, frame=frame)


def with_losses(runs, losses, *, budget):
    """The runs with other losses at a budget: by method, width and seed."""
    frame = runs.frame.copy()
    for method, widths in losses.items():
        for width, values in widths.items():
            for seed, loss in enumerate(values):
                at = (frame.method == method) & (frame.budget == budget) & (frame.width == width)
                frame.loc[at & (frame.stage == "main") & (frame.seed == seed), HELD_OUT] = loss
    return replace(runs, frame=frame)


def test_each_method_is_shown_at_its_own_best_size(runs, analysis):
    for budget in analysis.budgets[:3]:
        for method in ADVANTAGE:
            best, means = analysis.best(method, budget), analysis.losses(method, budget).mean(axis=1)
            assert means[best] == means.min()
            assert best in (48, 64)
            at = runs.done[(runs.done.method == method) & (runs.done.budget == budget) & (runs.done.stage == "main")]
            sizes = dict(zip(at.width, at.parameters_active, strict=True))
            if method != "moe":
                assert sizes[48] < analysis.fit(method, budget, "active").optimum < sizes[64]
    # The last budget is run at the best size alone, where no parabola can be laid.
    for method in ADVANTAGE:
        (last,) = analysis.losses(method, 1e14).index
        assert last == analysis.best(method, 3e13)
        assert analysis.fit(method, 1e14, "active").refusal == "a parabola needs three sizes, got 1"
    # A size that lacks a seed is never the best: its mean would be of other seeds.
    lacking = analysis.losses("peer", 3e13).iloc[-1]
    assert lacking.notna().sum() == 2
    assert analysis.best("peer", 3e13) != lacking.name


def test_runs_that_are_to_come_leave_a_budget_unfinished(runs):
    """Width 48 lacks two seeds of PEER's, and width 64 has not been run: what is there may be the best, or not."""
    frame = runs.frame
    here = (frame.method == "peer") & (frame.budget == 1e13) & (frame.stage == "main")
    is_open = here & ((frame.width == 64) | ((frame.width == 48) & (frame.seed > 0)))
    assert is_open.sum() == 5
    analysis = IsoFlopAnalysis(without(runs, is_open, "to come"))
    assert analysis.best("peer", 1e13) is None
    claims = {claim.text: claim for claim in analysis.claims()}
    claim = claims["At 1e+13 FLOPs PEER reaches a lower loss than dense"]
    assert (claim.verdict, claim.evidence) == ("unfinished", "runs are still to come")
    # With one seed of each width they can be compared over that seed, but nothing is decided.
    analysis = IsoFlopAnalysis(without(runs, is_open & (frame.seed > 0), "to come"))
    assert analysis.best("peer", 1e13) == analysis.losses("peer", 1e13)[0].idxmin()
    (claim,) = [c for c in analysis.claims() if c.text == claim.text]
    assert claim.verdict == "unfinished"
    assert claim.evidence.endswith(" nats, no interval, one seed")


def test_a_width_that_lost_a_seed_neither_wins_nor_decides(runs):
    """Width 96 has its seed 0 alone, in which width 48 is the better one; in the mean of all seeds 64 is."""
    losses = {48: (3.0, 3.5, 3.5), 64: (3.1, 3.0, 3.1), 96: (5.0, 5.0, 5.0)}
    runs = with_losses(runs, {"dense": losses}, budget=1e13)
    frame = runs.frame
    here = (frame.method == "dense") & (frame.budget == 1e13)
    is_out = here & ((frame.width == 32) | ((frame.width == 96) & (frame.seed > 0)))
    assert IsoFlopAnalysis(without(runs, is_out, "failed")).best("dense", 1e13) == 64


def test_unfinished_budgets_are_marked_in_every_table(runs, of_peer):
    frame = runs.frame
    is_open = (frame.method == "pkm") & (frame.budget == 1e13) & (frame.seed == 2) & (frame.stage == "main")
    assert is_open.sum() == 4
    unfinished = IsoFlopAnalysis(without(runs, is_open, "to come"))
    unfinished.laws = dict.fromkeys(ADVANTAGE, of_peer.laws["peer"])
    tables = {table.name: table for table in isoflop_tables(unfinished)}
    for row in tables["differences"].rows:
        assert (row[-1] == "unfinished") == (row[:2] == ("1e+13", "PKM"))
    multipliers = {row[:2]: row for row in tables["compute-multiplier"].rows}
    assert multipliers["1e+13", "PKM"][2:] == ("\N{EN DASH}", "\N{EN DASH}", "unfinished")
    assert multipliers["1e+13", "PEER"][-1] != "unfinished"
    for row in tables["optimum"].rows:
        assert row[-1].startswith("unfinished") == (row[:2] == ("1e+13", "PKM"))
    for row in tables["scaling-law"].rows:
        assert row[-1].startswith("unfinished") == (row[0] == "PKM")
    marked = {row[:2] for row in tables["perplexity"].rows if "unfinished" in row[1]}
    assert marked == {("1e+13", "PKM, unfinished")}
    assert {row[:2] for row in tables["differences-by-width"].rows if "unfinished" in row[1]} == marked


def test_an_ablation_with_runs_to_come_has_no_verdict(tmp_path):
    def loss(run):
        return 4 - 0.02 * math.log2(run.axes["num_experts"]) + NOISE[run.axes["seed"]]

    runs = read_runs(fill(tmp_path / "study", NUM_EXPERTS, loss))
    largest = (runs.frame.num_experts == 262144) & (runs.frame.budget == 3e12)
    claims = NUM_EXPERTS.findings(without(runs, largest, "to come")).findings
    assert [claim.verdict for claim in claims] == ["unfinished", "reproduced"]


def test_a_best_width_at_the_end_of_the_grid_is_said(runs, analysis):
    narrow = replace(runs, frame=runs.frame[runs.frame.width <= 48])
    found = [doubt for doubt in IsoFlopAnalysis(narrow).doubts() if "width" in doubt]
    assert found[0] == "dense: the best width at 3e+12 FLOPs is the last that was tried, 48."
    assert not [doubt for doubt in analysis.doubts() if "best width" in doubt]


def test_the_report_is_whole_and_escaped(isoflop, isoflop_page):
    page = isoflop_page.read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "How often data was repeated is not known" in page
    assert page.count("<figure>") == 1 + 9 + 1 + 1, "the trend, sizes of three budgets, seconds, residuals"
    assert "tinyexperts 0.1, torch 2.13, python 3.11</p>" in page, "once, though machines differ"
    markdown = (isoflop.path / "report.md").read_text(encoding="utf-8")
    assert "What is missing or doubtful:\n\n- " in markdown
    assert "3 seeds; the paper's margins, \N{MINUS SIGN}0.145 and \N{MINUS SIGN}0.107, outside of it)" in markdown
    assert "PEER reaches a lower loss than dense: **reproduced**" in markdown
    assert "unfinished" not in markdown
    assert "### Perplexity of each method at its own best size" in markdown


@pytest.mark.usefixtures("isoflop_page")
def test_the_tables_hold_what_was_measured(isoflop, analysis, of_peer):
    row = next(row for row in rows_of(isoflop, "perplexity") if (row["FLOPs"], row["method"]) == ("1e+13", "PEER"))
    best = analysis.at_best("peer", 1e13).mean()
    assert float(row["held out"]) == pytest.approx(math.exp(best), abs=0.01)
    assert float(row["poems"]) == pytest.approx(math.exp(best + 0.25), abs=0.01)
    paper = [row for row in rows_of(isoflop, "perplexity") if row["FLOPs"] == "paper, 2e+19"]
    assert [row["C4"] for row in paper] == ["18.31", "17.12", "17.36", "16.45"]
    differences = {(row["FLOPs"], row["baseline"], row["on"]): row for row in rows_of(isoflop, "differences")}
    # At equal time the last budget reaches beyond what is known, and so does the first where routers are not counted.
    assert len(differences) == 4 * 3 * 7 - 1 - 2
    assert ("3e+12", "dense", "held out, router not counted") not in differences
    assert ("1e+14", "dense", "held out, at equal time") not in differences, "beyond the last budget nothing is known"
    dense = differences["1e+13", "dense", "held out"]
    assert (dense["mean"], dense["outcome"]) == ("\N{MINUS SIGN}0.050", "PEER lower")
    new = differences["1e+13", "dense", "held out, tokens whose bigram is new"]
    poems = differences["1e+13", "dense", "poems"]
    assert (new["mean"], poems["mean"]) == ("\N{MINUS SIGN}0.050", "\N{MINUS SIGN}0.050")
    # In PEER's 125 s dense gets from 1e13 FLOPs, 100 s, to a fifth of the way to 3e13, on a logarithmic scale.
    falls = analysis.at_best("dense", 1e13).mean() - analysis.at_best("dense", 3e13).mean()
    at_equal_time = differences["1e+13", "dense", "held out, at equal time"]
    expected = -0.05 + falls * math.log(1.25) / math.log(3)
    assert float(at_equal_time["mean"].replace("\N{MINUS SIGN}", "-")) == pytest.approx(expected, abs=2e-3)
    assert at_equal_time["outcome"] == "not judged"
    three = [analysis.best_runs(*of) for of in (("peer", 1e13), ("dense", 3e12), ("dense", 1e13))]
    peer, dense_before, dense_now = (runs[HELD_OUT].mean() for runs in three)
    router = three[0].query_network_flops + three[0].sub_key_scores_flops
    share = (router / three[0].total_flops).iloc[0]
    spent = [math.log(runs.training_flops.iloc[0]) for runs in three]
    place = (spent[0] + math.log(1 - share) - spent[1]) / (spent[2] - spent[1])
    reached = (1 - place) * dense_before + place * dense_now
    without_router = float(
        differences["1e+13", "dense", "held out, router not counted"]["mean"].replace("\N{MINUS SIGN}", "-")
    )
    assert without_router == pytest.approx(peer - reached, abs=6e-4)
    assert without_router < -0.053, "more than at equal counts with it"
    flops = next(row for row in rows_of(isoflop, "flops") if row["method"] == "PEER")
    parts = [float(value.rstrip("%")) for value in list(flops.values())[3:]]
    assert sum(parts) == pytest.approx(100, abs=0.3)
    assert min(parts) > 0
    assert differences["1e+13", "MoE", "held out"]["outcome"] == "no difference shown"
    # Dense falls by 0.2 nats from 1e12 to 1e13: 0.05 nats are a factor of 10^(1/4), less what its sizes cost.
    multiplier = next(
        row for row in rows_of(isoflop, "compute-multiplier") if (row["FLOPs"], row["method"]) == ("3e+12", "PEER")
    )
    assert float(multiplier["multiplier"]) == pytest.approx(10**0.25, rel=0.1)
    top = next(
        row for row in rows_of(isoflop, "compute-multiplier") if (row["FLOPs"], row["method"]) == ("1e+14", "PEER")
    )
    assert top["why none"] == "more than 1.00: the baseline's largest budget does not reach the loss"
    assert len(rows_of(isoflop, "tuning")) == 40
    without = next(row for row in rows_of(isoflop, "points") if row["method"] == "PEER")
    assert float(without["without router"]) < float(without["training FLOPs"])
    assert (without["usage, %"], without["unevenness, nats"]) == ("75.0", "0.50")
    laws = {row["method"]: row for row in rows_of(isoflop, "scaling-law")}
    assert laws.keys() == {"dense", "MoE", "PKM", "PEER"}
    fit = of_peer.laws["peer"]
    for name, found in {**fit.exponents, "c": fit.constant}.items():
        assert float(laws["PEER"][name]) == pytest.approx(found, abs=6e-4)
        (low, high), is_open = fit.intervals[name], fit.open_ends[name]
        shown = [f"{end:.3f}" if not opened else "open" for end, opened in zip((low, high), is_open, strict=True)]
        assert laws["PEER"][f"{name}, 95 %"] == " to ".join(shown)
    by_width = {(row["FLOPs"], row["baseline"], row["width"]): row for row in rows_of(isoflop, "differences-by-width")}
    assert len(by_width) == 3 * (3 + 4 + 3 + 1)
    for width in (32, 48, 64, 96):
        ours, theirs = (analysis.losses(method, 1e13).loc[width] for method in ("peer", "dense"))
        expected = (ours - theirs).mean()
        shown = by_width["1e+13", "dense", str(width)]
        assert float(shown["mean"].replace("\N{MINUS SIGN}", "-")) == pytest.approx(expected, abs=6e-4)
    assert by_width["3e+13", "PKM", "96"]["seeds"] == "2"


def test_every_run_has_a_row_of_its_own_in_the_report(isoflop, isoflop_page, runs):
    runs = runs.done
    rows = {row["run"]: row for row in rows_of(isoflop, "runs")}
    assert list(rows) == list(runs.name)
    for name, row in rows.items():
        assert float(row["loss, held out"]) == pytest.approx(runs[HELD_OUT][name], abs=6e-5)
        assert float(row["loss, poems"]) == pytest.approx(runs["loss, poems"][name], abs=6e-5)
        speed = runs.training_flops[name] / float(row["seconds of training"])
        assert float(row["training FLOPs a second"]) == pytest.approx(speed, rel=0.02)
    median = statistics.median(float(row["training FLOPs a second"]) for row in rows.values())
    shown = re.search(r"The median is ([\d.e+]+)\.", isoflop_page.read_text(encoding="utf-8"))
    assert float(shown[1]) == pytest.approx(median, rel=0.05)


def test_one_seed_has_no_interval():
    (one, three) = (verdict_on("x", SeedInterval(values=values)) for values in ((-0.04,), (-0.04, -0.05, -0.06)))
    assert one.evidence == "\N{MINUS SIGN}0.040 nats, no interval, one seed"
    assert three.evidence.endswith(", 3 seeds")
    assert (one.verdict, three.verdict) == ("can't tell", "reproduced")


@pytest.mark.usefixtures("isoflop_page")
def test_the_residuals_are_those_of_the_law_and_show_a_run_astray(isoflop, runs, analysis, of_peer):
    law, ours = of_peer.laws["peer"], of_peer.runs
    predicted = [law.loss(P=p, D=d) for p, d in zip(ours.parameters_active, ours.num_tokens, strict=True)]
    np.testing.assert_allclose(law.residuals, ours[HELD_OUT] - predicted, atol=1e-9)
    rows = [row for row in rows_of(isoflop, "optimum") if row["FLOPs"] == "1e+13"]
    fit = analysis.fit("dense", 1e13, "active")
    assert float(rows[0]["residuals, nats (RMS)"]) == pytest.approx(np.sqrt((fit.residuals**2).mean()), abs=1e-3)
    assert "Residuals of the laws" in residuals(of_peer).svg
    few = IsoFlopAnalysis(replace(runs, frame=ours[-4:]))
    assert "peer" not in few.laws
    assert residuals(few) is None


@pytest.mark.usefixtures("isoflop_page")
def test_every_row_has_its_command(isoflop, runs, analysis):
    commands = {row["run"]: row["command"] for row in rows_of(isoflop, "commands")}
    assert len(analysis.tuning) == 40
    listed = [runs.planned[name] for name in (*analysis.points.name, *analysis.tuning.name)]
    by_options = {}
    for run in listed:
        words = shlex.split(commands[run.name])
        assert words[:2] == ["tinyexperts", "train"]
        values = dict(zip(words[3::2], words[4::2], strict=True))
        config = run.config
        assert Path(values["--run"]) == Path("runs", run.name)
        for option, value in (("seed", config.seed), ("model.d-model", config.model.d_model)):
            assert int(values.get(f"--{option}", attrgetter(option.replace("-", "_"))(RECIPES[words[2]]()))) == value
        assert float(values["--training-flops"]) == config.training_flops
        by_options[words[2], *words[3::2]] = run, words
    # tyro takes a while for each: the last one of those that name the same options.
    assert len(by_options) > 20
    for run, words in by_options.values():
        recipe = RECIPES[words[2]]
        parsed = tyro.cli(TrainConfig, default=recipe(), args=words[3:], config=(tyro.conf.AvoidSubcommands,))
        assert parsed == replace(run.config, run=Path("runs", run.name))


def test_a_command_writes_out_every_kind_of_setting():
    config = recipes.peer()
    layer = replace(config.model.expert_layer, gated=True, shared_sub_keys=False, query_norm="none")
    model = replace(config.model, expert_layer=layer, expert_blocks=(0, 2), tied_embeddings=True)
    config = replace(
        config, run=Path("a folder"), model=model, num_steps=7,
        training_flops=None, threads=1, checkpoint=CheckpointConfig(asynchronous=True),
        optimizer=OptimizerConfig(betas=(0.8, 0.95), gradient_clip=None),
    )  # fmt: skip
    words = shlex.split(train_command("peer", config))
    parsed = tyro.cli(TrainConfig, default=recipes.peer(), args=words[3:], config=(tyro.conf.AvoidSubcommands,))
    assert parsed == config


def test_the_verdict_on_an_ablation_compares_the_ends_of_its_axis(tmp_path):
    def loss(run):
        return 4 - 0.02 * math.log2(run.axes["num_experts"]) + NOISE[run.axes["seed"]]

    folder = fill(tmp_path / "study", NUM_EXPERTS, loss)
    runs = read_runs(folder)
    claims = NUM_EXPERTS.findings(runs).findings
    assert [claim.verdict for claim in claims] == ["reproduced", "reproduced"]
    assert "(262,144 against 4,096)" in claims[0].text
    page = write_study_report(NUM_EXPERTS, folder, command="x").read_text(encoding="utf-8")
    assert page.count("<figure>") == 2, "loss and unevenness"
    rows = rows_of(folder, "points")
    assert len(rows) == 8
    assert {(row["usage, %"], row["unevenness, nats"]) for row in rows} == {("75.0", "0.50")}
    assert rows[3]["loss against the first of its series"] == "\N{MINUS SIGN}0.120"
    low, high = rows[3]["95 % interval"].replace("\N{MINUS SIGN}", "-").split(" to ")
    assert float(low) <= -0.12 <= float(high)
    assert rows[0]["95 % interval"] == MISSING
    fewest = {"num_experts": 64**2, "budget": 3e12}
    cost = account(next(run.config for run in runs.planned.values() if fewest.items() <= run.axes.items()))
    assert rows[0]["training FLOPs"] == f"{cost.training_flops:.3e}"
    assert float(rows[0]["without router"]) < float(rows[0]["training FLOPs"])


def test_an_ablation_is_reported_without_the_router_too(tmp_path):
    """Losses that depend on the FLOPs without the router's, and 0.12 nats that the most experts save."""

    def loss(run):
        flops = account(run.config).training_flops_without_router
        return 30 - 0.9 * math.log(flops) - 0.02 * math.log2(run.axes["num_experts"] / 64**2) + NOISE[run.axes["seed"]]

    folder = fill(tmp_path / "study", NUM_EXPERTS, loss)
    write_study_report(NUM_EXPERTS, folder, command="x")
    rows = rows_of(folder, "points")
    shown = [row["the same, router not counted"] for row in rows]
    assert shown == [MISSING, *(f"\N{MINUS SIGN}{saved:.3f}" for saved in (0.04, 0.08, 0.12))] * 2
    counted = rows[3]["loss against the first of its series"].replace("\N{MINUS SIGN}", "-")
    assert float(counted) > -0.12 + 0.02, "the router's FLOPs are missing for tokens"
    low, high = rows[3]["its 95 % interval"].replace("\N{MINUS SIGN}", "-").split(" to ")
    assert float(low) <= -0.12 <= float(high)

    fill(tmp_path / "one", PLACEMENT, lambda run: 4.0)
    write_study_report(PLACEMENT, StudyFolder(tmp_path / "one"), command="x")
    assert "the same, router not counted" not in rows_of(StudyFolder(tmp_path / "one"), "points")[0]


def test_optimizers_are_compared_each_at_its_own_best_rate(tmp_path):
    """Those with a moment a row are 0.03 better than sparse, at thrice its rate; dense ones 0.01 worse, at a third."""
    tuned = scale_named("laptop", data=Path("x"), vocab_size=9).peer_settings["optimizer.table_learning_rate"]
    best = {"sparse-element": (1, 0.0), "sparse-row": (3, -0.03), "dense-element": (0.3, 0.01)}

    def loss(run):
        rate = run.axes["table_learning_rate"] / tuned
        name = f"{run.config.optimizer.table_gradients}-{run.config.optimizer.table_second_moment}"
        factor, difference = best[name]
        return 4 + difference + 0.1 * abs(math.log(rate / factor)) + NOISE[run.axes["seed"]]

    folder = fill(tmp_path / "study", OPTIMIZER, loss)
    write_study_report(OPTIMIZER, folder, command="x")
    rows = {row["optimizer"]: row for row in rows_of(folder, "optimizers")}
    assert {name: float(row["table learning rate"]) for name, row in rows.items()} == pytest.approx(
        {"sparse": 5e-3, "sparse-row": 1.5e-2, "dense": 1.5e-3}
    )
    shown = [rows[name]["loss against sparse"] for name in ("sparse", "sparse-row", "dense")]
    assert shown == [MISSING, "\N{MINUS SIGN}0.030", "+0.010"]
    assert rows["dense"]["95 % interval"].startswith("+0.010 to")


def test_placements_are_compared_with_the_papers_block(tmp_path):
    folder = fill(tmp_path / "study", PLACEMENT, lambda run: 4 + 0.01 * run.axes["block"])
    write_study_report(PLACEMENT, folder, command="x")
    shown = {row["block"]: row["loss against the middle block"] for row in rows_of(folder, "points")}
    assert shown == {"0": "\N{MINUS SIGN}0.020", "1": "\N{MINUS SIGN}0.010", "2": MISSING, "3": "+0.010"}


def test_ablations_have_the_settings_that_were_tuned():
    """As the laptop study, whose results are in docs/, came out."""
    with Path(__file__).parents[2].joinpath("docs/results/laptop/tables/commands.csv").open() as file:
        command = next(row["command"] for row in csv.DictReader(file) if row["run"].startswith("peer-d64-c1e13"))
    words = shlex.split(command)
    tuned = tyro.cli(TrainConfig, default=recipes.peer(), args=words[3:], config=(tyro.conf.AvoidSubcommands,))
    scale = scale_named("laptop", data=Path("x"), vocab_size=9)
    assert {name: attrgetter(name)(tuned) for name in scale.peer_settings} == scale.peer_settings
    assert "batch_size" in scale.peer_settings
    (run, *_) = NUM_EXPERTS.stages(scale)[0]({})
    assert {name: attrgetter(name)(run.config) for name in scale.peer_settings} == scale.peer_settings


@pytest.mark.parametrize(
    "study",
    [study for study in STUDIES if getattr(study.findings, "__func__", None) is Ablation.findings],
    ids=lambda study: study.name,
)
def test_every_ablation_has_a_report(study, tmp_path):
    folder = fill(tmp_path / "study", study, lambda run: 4 + NOISE[run.axes["seed"]])
    page = write_study_report(study, folder, command="x").read_text(encoding="utf-8")
    assert page.count("<figure>") == 2, "loss and unevenness"
    assert "Every point of the grid" in page
    assert "reproduced</strong>" not in page, "equal losses decide nothing"


def test_without_a_finished_run_there_is_no_report(tmp_path):
    study = Study(name="usage", summary="", question="?", stages=lambda scale: (), findings=NUM_EXPERTS.findings)
    folder = fill(tmp_path / "study", study, None)
    (folder.path / "planned").mkdir()
    with pytest.raises(InputError, match=r"no run of the study in .* is done"):
        write_study_report(study, folder, command="x")


def test_the_command_writes_the_report_of_a_study_folder(run_cli, tmp_path):
    study = fill(tmp_path / "study", NUM_EXPERTS, lambda run: 4.0 + NOISE[run.axes["seed"]]).path
    report = study / "report.html"
    code, out, _ = run_cli("study", "report", study)
    assert (code, out.strip()) == (0, str(report))
    assert "The study num-experts at laptop scale" in report.read_text(encoding="utf-8")
    code, _, err = run_cli("study", "report", study, "--title", "mine")
    assert code == 2
    assert f"--title is for a report of runs, and {study} is a study, got mine\n" in err
    code, _, err = run_cli("study", "report", study, tmp_path)
    assert code == 2
    assert "a study's report is of one folder, got 2" in err


def test_cells_cannot_break_a_table():
    table = Table(name="t", title="T", columns=("a", "b"), rows=(("x|y", "1,2\n3"),))
    assert "| x\\|y | 1,2 3 |" in table.as_markdown()
    assert list(csv.reader(table.as_csv().splitlines(keepends=True)))[1] == ["x|y", "1,2\n3"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_report_in_a_browser(isoflop_page):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 900})
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: errors.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(isoflop_page.as_uri())
        sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        texts = page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(svg => svg.querySelectorAll('text').length)"
        )
        browser.close()
    assert not errors
    assert sizes[0] <= sizes[1], "the page scrolls sideways"
    assert len(texts) == 12
    assert min(texts) > 8


def test_columns_of_words_are_distinguished_from_columns_of_numbers():
    minus, dash = "\N{MINUS SIGN}", "\N{EN DASH}"
    numbers = [
        f"{minus}0.05",
        "+0.1",
        "3.22 B",
        "1 k to open",
        "3e+12",
        "4.5e-3",
        "12,345",
        f"{minus}0.1 to +0.2",
        "97.5 %",
        dash,
        "",
    ]
    rows = tuple((number, word) for number, word in zip(numbers, ["3x", *"abcdefghij"], strict=True))
    table = Table(name="t", title="T", columns=("n", "w"), rows=rows)
    assert [table.is_text(column) for column in (0, 1)] == [False, True]
    long = Table(name="t", title="T", columns=("n",), rows=(("2" * 40 + "x",),))
    assert long.is_text(0), "and at once"


def test_the_trend_shows_zero_and_no_interval_where_there_is_none(runs, analysis):
    found = difference_trend(analysis).svg
    assert "against dense \N{MINUS SIGN}0.050" in found
    # With one seed there is no interval to draw: three caps less for each budget's bars.
    one = difference_trend(IsoFlopAnalysis(replace(runs, frame=runs.frame[runs.frame.seed == 0]))).svg
    assert one.count("<use") < found.count("<use")
    only = IsoFlopAnalysis(replace(runs, frame=runs.frame[runs.frame.budget == 1e13]))
    assert difference_trend(only) is None
    labels = [text for text in re.findall(r">([^<]+)</text>", found) if text.strip() in ("0.0", "0.00", "0")]
    assert labels, "zero is inside of the frame"


def test_the_trend_holds_every_interval_of_three_seeds(runs):
    analysis = IsoFlopAnalysis(replace(runs, frame=runs.frame[runs.frame.budget < 2e13]))
    ends = [end for budget in analysis.budgets for end in analysis.difference("moe", budget).bounds]
    assert max(ends) - min(ends) > 0.5, "those of the uneven method are wide"
    labels = re.findall(r">([^<]+)</text>", difference_trend(analysis).svg)
    ticks = [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels if re.fullmatch(r"\W?\d\.\d+", label)]
    step = ticks[1] - ticks[0]
    assert min(ticks) - step < min(ends)
    assert max(ends) < max(ticks) + step


def test_a_best_value_at_the_end_of_what_was_tried_is_reported(tmp_path):
    def loss(run):
        return isoflop_loss(run) - 0.1 * (run.name in ("tune-dense-head-x2-seed0", "tune-peer-table-x2-seed0"))

    def falling(run):
        return loss(run) - 0.2 * (run.name == "tune-peer-table-x4-seed0")

    analysis = IsoFlopAnalysis(read_runs(fill(tmp_path / "study", ISOFLOP, falling)))
    assert len(analysis.tuning) == 40 + 2
    widths = "dense 64, MoE 64, PKM 64, PEER 64"
    one_width = f"At 1e+14 FLOPs one width was run of each ({widths}): a better one may exist."
    assert analysis.doubts() == [one_width, "PEER: the best table is the last that was tried, 4 times the default."]


def test_no_seed_takes_part_in_choosing_the_width_at_which_it_is_compared(runs):
    losses = {
        "dense": {32: (9, 9, 9), 48: (3.0, 3.4, 3.5), 64: (3.3, 3.2, 3.1), 96: (9, 9, 9)},
        "peer": {32: (9, 9, 9), 48: (2, 2, 2), 64: (3, 3, 3), 96: (9, 9, 9)},
    }
    runs = with_losses(runs, losses, budget=1e13)
    found = IsoFlopAnalysis(runs).difference_with_widths_of_other_seeds("dense", 1e13)
    # Seeds 1 and 2 choose width 64 for seed 0; 0 and 2 choose 64 for seed 1, by 0.05; 0 and 1 choose 48 for seed 2.
    assert found.values == pytest.approx((2 - 3.3, 2 - 3.2, 2 - 3.5))
    one = IsoFlopAnalysis(replace(runs, frame=runs.frame[runs.frame.seed == 0]))
    assert one.difference_with_widths_of_other_seeds("dense", 1e13) is None


def test_losses_that_are_not_finite_are_no_difference(runs):
    frame = runs.frame.copy()
    frame.loc[(frame.method == "dense") & (frame.seed == 1), "stood_earlier"] = math.nan
    difference = IsoFlopAnalysis(replace(runs, frame=frame)).difference("dense", 1e13, "stood_earlier")
    assert len(difference.values) == 2


def test_curves_that_share_no_seconds_are_drawn(runs):
    results = [each for each in runs.results.values() if each.name.startswith("peer-")][:2]
    later = tuple({**line, "seconds": line["seconds"] + 1e4} for line in results[1].validation)
    runs = [replace(each, method="peer") for each in (results[0], replace(results[1], validation=later))]
    assert "It ends at PEER" in training_curves(runs, "seconds").svg


def test_a_folder_of_the_study_that_was_called_by_the_british_word_still_opens(tmp_path):
    folder = fill(tmp_path / "study", OPTIMIZER, lambda run: 4 + NOISE[run.axes["seed"]])
    for path in (folder.path / "study.json", *folder.path.glob("planned/*.json")):
        path.write_text(
            path.read_text().replace('"optimizer": "', '"optimiser": "').replace('"optimizer",', '"optimiser",')
        )
    assert '"optimiser"' in (folder.path / "study.json").read_text()
    assert all('"optimiser": "' in path.read_text() for path in folder.path.glob("planned/*.json"))
    assert folder.settings().study == "optimizer"
    write_study_report(OPTIMIZER, folder, command="x")
    assert {row["optimizer"] for row in rows_of(folder, "optimizers")} == {"sparse", "sparse-row", "dense"}
