"""The study of facts: its grid, and what its report says of made-up runs."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from study_folder import fill

from tinyexperts.data import PrepareConfig, prepare
from tinyexperts.study import run_study
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.scales import on_facts, scale_named
from tinyexperts.study.studies.facts import FACTS
from tinyexperts.study.studies.facts.grid import FRESH_SEEDS, LAST_SEEDS
from tinyexperts.study.studies.num_experts import NUM_EXPERTS
from tinyexperts.study.studies.variants import VARIANTS
from tinyexperts.study.study_report import write_study_report

BEST = {"dense": 48, "moe": 32, "pkm": 32, "peer": 32}
AHEAD = {"dense": 0.0, "moe": 1.0, "pkm": 2.0, "peer": 3.0}


def is_fresh(run) -> bool:
    return run.axes["stage"] == "fresh"


def made_up_loss(run) -> float:
    """Fresh seeds say that PEER is ahead; the seeds that choose the width would say that dense is."""
    distance = abs(math.log(run.axes["width"] / BEST[run.method]))
    ahead = AHEAD[run.method] if is_fresh(run) else -AHEAD[run.method]
    return 9 - 0.1 * math.log10(run.axes["budget"]) + distance - ahead + 0.01 * (run.axes["seed"] % 3)


def made_up_facts(run) -> dict[str, tuple[float, float]]:
    wobble = 0.02 * (run.axes["seed"] % 3) * (1 if run.method == "peer" else -1)
    known = 2 * made_up_loss(run) + wobble
    return {
        "validation": (0.1 * AHEAD[run.method], known),
        "unseen-phrasing": (0.05 * AHEAD[run.method], known + 1),
        "unseen-entities": (0.0, 12 + wobble),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("facts") / "study", FACTS, made_up_loss, facts=made_up_facts)


@pytest.fixture(scope="module")
def page(folder):
    """The text of its report."""
    return write_study_report(FACTS, folder, command="x").read_text(encoding="utf-8")


def test_fresh_seeds_are_run_at_each_best_width_of_each_budget(folder) -> None:
    runs = [run for run in folder.planned_runs() if is_fresh(run)]
    num_seeds = {budget: len(FRESH_SEEDS) for budget in scale_of_facts().budgets} | {1e14: len(LAST_SEEDS)}
    assert Counter((run.method, run.axes["budget"]) for run in runs) == {
        (method, budget): number for method in BEST for budget, number in num_seeds.items()
    }
    assert {(run.method, run.axes["width"]) for run in runs} == set(BEST.items())
    assert {run.name for run in runs if run.axes["budget"] == 2.5e12} >= {"peer-d32-c2.5e12-seed10"}
    others = [run for run in folder.planned_runs() if not is_fresh(run)]
    chosen_by = {run.config.seed for run in others if not run.is_alone}
    assert not {run.config.seed for run in runs} & chosen_by
    assert len({run.name for run in (*runs, *others)}) == len(runs) + len(others)


def planned(loss, scale) -> list[list]:
    """The runs of each stage, when runs end with the given losses."""
    losses, stages = {}, []
    for stage in FACTS.stages(scale):
        stages.append(stage(losses))
        losses |= {run.name: loss(run) for run in stages[-1]}
    return stages


def test_a_setting_is_tuned_on_while_its_last_value_is_the_best() -> None:
    base = scale_of_facts().base.optimizer.table_learning_rate

    def loss(run) -> float:
        if run.axes["stage"] == "tuning" and run.method == "pkm" and "table" in run.name:
            return abs(math.log(run.config.optimizer.table_learning_rate / (24 * base)))  # between x16 and x32
        return 10.0

    stages = planned(loss, scale_of_facts())
    tried = [[run.name for run in runs if run.method == "pkm" and "table" in run.name] for runs in stages[:6]]
    assert tried == [
        ["tune-pkm-table-x0.5-seed0", "tune-pkm-table-x2-seed0"],
        *([f"tune-pkm-table-x{factor}-seed0"] for factor in (4, 8, 16, 32, 64)),
    ]
    (rate,) = {run.config.optimizer.table_learning_rate for runs in stages[6:] for run in runs if run.method == "pkm"}
    assert rate == 32 * base  # ln(32 / 24) is less than ln(24 / 16)
    assert {run.config.optimizer.table_learning_rate for run in stages[-1] if run.method == "peer"} == {base}


def test_a_budget_is_compared_before_the_next_larger_one_is_begun() -> None:
    budgets = [{run.axes["budget"] for run in runs} for runs in planned(made_up_loss, scale_of_facts())]
    assert [budget for budget in budgets if budget] == [
        {1e13},  # tuning
        *([{2.5e12}] * 2),
        *([{1e13}] * 2),
        *([{3e13}] * 2),
        {2.5e12, 5e12},  # timed
        {1e14},
    ]


def test_widths_around_the_best_are_run_until_the_best_lies_between_two() -> None:
    best = {2.5e12: 32, 1e13: 96, 3e13: 16}

    def loss(run) -> float:
        return abs(math.log(run.axes["width"] / best.get(run.axes["budget"], 16))) + 0.01 * run.axes["seed"]

    tried = [
        (runs[0].axes["budget"], sorted({run.axes["width"] for run in runs if run.method == "moe"}))
        for runs in planned(loss, scale_of_facts())
        if runs and runs[0].axes["stage"] == "main"
    ]
    assert tried == [
        (2.5e12, [16, 32, 48, 64, 96]),  # before there is a best width, all
        (1e13, [16, 32, 48]),
        (1e13, [64]),
        (1e13, [96]),
        (3e13, [64, 96]),
        (3e13, [48]),
        (3e13, [32]),  # two moves are the most
    ]


def test_a_method_without_a_best_width_is_run_at_all_widths() -> None:
    def loss(run) -> float:
        lost = run.method == "pkm" and run.axes["stage"] == "main" and run.axes["budget"] == 2.5e12
        return math.nan if lost else made_up_loss(run)

    for runs in planned(loss, scale_of_facts()):
        if runs and runs[0].axes["stage"] == "main" and runs[0].axes["budget"] == 1e13:
            tried = {method: {run.axes["width"] for run in runs if run.method == method} for method in BEST}
            assert tried == {
                "dense": {32, 48, 64},
                "moe": {16, 32, 48},
                "pkm": {16, 32, 48, 64, 96},
                "peer": {16, 32, 48},
            }
            break


@pytest.mark.parametrize(
    ("noise", "seeds"),
    [
        (0.1, 5),
        # t * s / sqrt(n), with s = 0.8 * sqrt(0.3), is 0.54 for n = 5 and 0.46 for n = 6; half the difference is 0.5.
        (0.8, 6),
        (3.0, 5),  # more than would be run
    ],
)
def test_as_many_seeds_are_run_as_the_interval_asks_for(noise, seeds) -> None:
    """Dense is 1 nat behind; its first five seeds deviate by noise * sqrt(0.3), PEER's by nothing."""

    def loss(run) -> float:
        wobble = noise * (run.axes["seed"] % 2) if run.method == "dense" else 0.0
        return 1 + wobble + (0 if run.method == "peer" else 1 - 0.4 * noise if run.method == "dense" else 5)

    fresh = [run for runs in planned(loss, scale_of_facts()) for run in runs if is_fresh(run)]
    assert Counter((run.method, run.axes["budget"]) for run in fresh) == {
        (method, budget): number
        for method in BEST
        for budget, number in {2.5e12: seeds, 1e13: seeds, 3e13: seeds, 1e14: len(LAST_SEEDS)}.items()
    }


def scale_of_facts(num_entities=4000):
    return on_facts(scale_named("laptop", data=Path("data/none"), vocab_size=512), num_entities)


def test_the_sizes_are_those_of_statements() -> None:
    scale = scale_of_facts()
    assert scale.base.model.context_length == 128
    assert min(map(min, scale.widths.values())) == 16
    assert max(map(max, scale.widths.values())) == 96
    assert [scale_of_facts(number).tuning_budget for number in (10, 1000, 1001, 4000, 7884, 10**6)] == [
        *(2.5e12, 2.5e12, 1e13, 1e13, 3e13, 3e13)
    ]
    minute = scale_named("minute", data=Path("data/none"), vocab_size=512)
    assert on_facts(minute, 4000) == minute


def verdicts(page, beginning) -> list[str]:
    """The verdicts on the claims that begin so."""
    return re.findall(rf"{re.escape(beginning)}[^<]*<strong>([^<]*)</strong>", page)


def rows_of(folder, name):
    with (folder.path / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_report_compares_fresh_seeds_alone(folder, page) -> None:
    assert verdicts(page, "At ") == ["reproduced"] * 3 * (len(scale_of_facts().budgets) + 1)
    rows = rows_of(folder, "differences")
    by_measure = {
        (row["baseline"], row["measure"]): float(row["difference"].replace("\N{MINUS SIGN}", "-"))
        for row in rows
        if row["FLOPs"] == "1e+13"
    }
    # 2 * 3 nats ahead, and the wobbles of five seeds: 1, 2, 0, 1, 2 times 0.04.
    assert by_measure["dense", "nats a fact, known facts"] == pytest.approx(-6 + 0.04 * 1.2, abs=1e-3)
    assert by_measure["PKM", "nats a token, known facts"] == pytest.approx(-1, abs=1e-3)
    assert by_measure["MoE", "recall, known facts"] == pytest.approx(0.2, abs=1e-3)
    assert by_measure["dense", "nats a fact, entities never seen (the control)"] == pytest.approx(0.048, abs=1e-3)
    recall = {(row["FLOPs"], row["method"]): row for row in rows_of(folder, "recall")}
    row = recall["3e+13", "PEER"]
    assert (row["width"], row["seeds"], row["recall, known facts, %"]) == ("32", "5", "30.0")
    assert "How often data was repeated" not in page


def test_methods_are_timed_one_at_a_time_and_compared_at_equal_seconds(folder, page) -> None:
    timed = [run for run in folder.planned_runs() if run.is_alone]
    assert {(run.method, run.axes["width"], run.axes["budget"]) for run in timed} == {
        (method, width, budget) for method, width in BEST.items() for budget in (2.5e12, 5e12)
    }
    assert {run.axes["stage"] for run in timed} == {"timed"}
    assert len(verdicts(page, "In the seconds of 1e+13")) == 3
    rows = {(row["FLOPs"], row["method"]): row for row in rows_of(folder, "seconds")}
    assert len(rows) == 16
    # A run alone takes half as long: 1e13 FLOPs of dense 50 s, of PEER 62.5 s.
    assert rows["1e+13", "dense"]["seconds of a run"] == "50"
    assert rows["1e+13", "PEER"]["seconds of a run"] in ("62", "63")
    assert rows["1e+13", "dense"]["PEER's, times"] == "1.25"
    difference = rows["1e+13", "dense"]["PEER minus it in PEER's seconds, nats a fact"]
    # As at equal FLOPs, less what dense gains: 0.2 nats a factor of 10.
    at_equal_flops = -6 + 0.04 * 1.2
    assert float(difference.replace("\N{MINUS SIGN}", "-")) == pytest.approx(
        at_equal_flops + 0.2 * math.log10(1.25), abs=2e-3
    )
    assert rows["1e+14", "dense"]["PEER minus it in PEER's seconds, nats a fact"] == "\N{EN DASH}"


def test_runs_to_come_leave_the_verdict_open(tmp_path) -> None:
    names = {f"peer-d32-c1e13-seed{seed}" for seed in FRESH_SEEDS[1:]}
    folder = fill(tmp_path / "study", FACTS, made_up_loss, facts=made_up_facts, skip=names)
    page = write_study_report(FACTS, folder, command="x").read_text(encoding="utf-8")
    assert Counter(verdicts(page, "At ")) == {"unfinished": 3, "reproduced": 3 * len(scale_of_facts().budgets)}
    assert verdicts(page, "In the seconds of 1e+13")[0] == "unfinished"


def test_an_ablation_on_facts_is_judged_by_the_nats_of_an_answer(tmp_path) -> None:
    def facts(run) -> dict[str, tuple[float, float]]:
        nats = 8 - 0.1 * run.config.model.expert_layer.num_experts**0.5 / 64 + 0.01 * (run.axes["seed"] % 3)
        return {"validation": (0.25, nats)}

    # By the loss a token more experts would be worse.
    folder = fill(
        tmp_path / "study", NUM_EXPERTS, lambda run: 2 + 1e-7 * run.config.model.expert_layer.num_experts, facts=facts
    )
    runs = folder.planned_runs()
    assert {run.axes["num_experts"] for run in runs} == {64**2, 128**2, 256**2, 512**2, 1024**2}
    assert {run.axes["width"] for run in runs} == {32}
    page = write_study_report(NUM_EXPERTS, folder, command="x").read_text(encoding="utf-8")
    assert page.count("<strong>reproduced</strong>") == 2
    assert "How often data was repeated" not in page
    row = next(
        row for row in rows_of(folder, "points") if (row["num experts"], row["budget"]) == ("1,048,576", "1e+13")
    )
    assert (row["nats a fact"], row["recall, %"]) == ("6.41", "25.0")
    assert row["nats a fact against it"] == "\N{MINUS SIGN}1.50"
    assert row["loss against the first of its series"] == "+0.104"


def test_the_report_crosses_experts_and_entities(tmp_path) -> None:
    def facts(run) -> dict[str, tuple[float, float]]:
        recall = 0.001 * run.config.model.expert_layer.num_experts**0.5 / (run.axes["num_entities"] / 1000)
        return {"validation": (recall * run.axes["budget"] / 1e13, 8 - recall)}

    numbers = {Path("data/few"): 1000, Path("data/many"): 4000}
    folder = fill(tmp_path / "study", NUM_EXPERTS, lambda run: 2.0, facts=facts, num_entities=numbers)
    page = write_study_report(NUM_EXPERTS, folder, command="x").read_text(encoding="utf-8")
    assert "budget 1e+13, width 32, num entities 4,000: more experts reach a lower loss" in page
    rows = {(row["FLOPs"], row["experts"]): row for row in rows_of(folder, "recall-by-entities")}
    assert len(rows) == 10
    assert rows["1e+13", "1,048,576"]["1,000 entities"] == "102.4"
    assert rows["2.5e+12", "65,536"]["4,000 entities"] == "1.6"


def test_the_variants_differ_from_the_papers_layer_in_one_setting() -> None:
    runs = {run.axes["variant"]: run.config for run in VARIANTS.stages(scale_of_facts())[0]({})}
    paper = runs.pop("paper").model
    for name, config in runs.items():
        layers = [vars(model.expert_layer) | {"blocks": model.expert_blocks} for model in (paper, config.model)]
        assert sum(layers[0][field] != layers[1][field] for field in layers[0]) == 1, name
    assert runs["two-blocks"].model.blocks_with_experts == (1, 2)
    assert runs["all-blocks"].model.blocks_with_experts == (0, 1, 2, 3)


def test_a_data_set_without_facts_is_refused(run_cli, tiny_data, tmp_path) -> None:
    code, out, err = run_cli("study", "facts", "--scale", "minute", "--data", tiny_data, "--output", tmp_path / "s")
    assert (code, out) == (2, "")
    assert "the study facts needs a data set of facts, and" in " ".join(err.split())
    assert not (tmp_path / "s").exists()


@pytest.fixture
def make_facts(tmp_path):
    """A function that prepares a data set of facts about so many entities."""

    def make(number, vocab_size=300):
        table, folder = tmp_path / f"{number}.csv", tmp_path / f"facts-{number}-{vocab_size}"
        table.write_text("name,floor\n" + "".join(f"k{n},{n % 3}\n" for n in range(number)))
        if not folder.exists():
            prepare(PrepareConfig(facts=table, key="name", output=folder, vocab_size=vocab_size))
        return folder

    return make


def test_the_number_of_experts_is_crossed_with_that_of_entities(make_facts, run_cli, tmp_path, monkeypatch) -> None:
    few, many = make_facts(40), make_facts(60)
    planned = []
    monkeypatch.setattr(run_study, "run_jobs", lambda jobs, **options: planned.extend(jobs))
    command = ("study", "num-experts", "--scale", "minute", "--data", few, "--more-data", many)
    run_cli(*command, "--output", tmp_path / "s")
    runs = StudyFolder(tmp_path / "s").planned_runs()
    assert len(runs) == len(planned) == 16
    assert {(run.axes["num_entities"], run.config.data) for run in runs} == {(40, few), (60, many)}
    cells = Counter((run.axes["num_entities"], run.config.model.expert_layer.num_experts) for run in runs)
    assert cells == dict.fromkeys(((40, 256), (40, 1024), (60, 256), (60, 1024)), 4)
    assert len({run.name for run in runs}) == 16
    code, _, err = run_cli(*command[:-2], "--output", tmp_path / "s")
    assert code == 2
    assert f"more_data was ('{many}',), is ()" in " ".join(err.split())


@pytest.mark.parametrize(
    ("study", "more", "refusal"),
    [
        ("optimizer", (60, 300), "more_data are for num-experts and lifelong, got"),
        ("num-experts", (40, 310), "must have vocabularies of one size"),
        ("num-experts", (40, 300), "has 40 too"),
        ("num-experts", None, "must be of facts, and"),
    ],
)
def test_data_sets_that_cannot_be_compared_are_refused(
    make_facts, tiny_data, run_cli, tmp_path, study, more, refusal
) -> None:
    others = tiny_data if more is None else make_facts(*more)
    data = make_facts(40)
    code, out, err = run_cli(
        *("study", study, "--scale", "minute", "--data", data, "--more-data", others, "--output", tmp_path / "s")
    )
    assert (code, out) == (2, "")
    assert refusal in " ".join(err.split())
    assert not (tmp_path / "s").exists()
