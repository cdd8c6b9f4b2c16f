"""The study of lifelong learning: its grid, its folder, and what its report says of made-up runs."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinyexperts.data import PrepareConfig, TokenDataset, prepare
from tinyexperts.report.numbers import MISSING
from tinyexperts.study.analysis.frame import read_runs
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings
from tinyexperts.study.scales import TeachingSizes, on_facts, scale_named
from tinyexperts.study.studies.lifelong import LIFELONG
from tinyexperts.study.studies.lifelong.analysis import LifelongAnalysis
from tinyexperts.study.studies.lifelong.grid import Way, best_learning_rate
from tinyexperts.study.studies.lifelong.rounds import prepare_rounds
from tinyexperts.study.study_report import write_study_report
from tinyexperts.study.train_command import train_command

SIZES = TeachingSizes(num_entities=3, num_rounds=3, experts=(64**2,))
# Of the base's recall, lost in each round, in points of it.
LOST = {"tables": 4.0, "low-rank": 6.0, "everything": 8.0}
FACTOR = {"nothing": 3.0, "own-samples": 1.0, "data": 0.5}
BASE_RECALL = {"dense": 0.1, "moe": 0.2, "pkm": 0.4, "peer": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of airports, and the rounds of others."""
    folder = tmp_path_factory.mktemp("airports")
    prepare(PrepareConfig(corpus="airports", max_entities=40, vocab_size=300, output=folder / "data"))
    base = TokenDataset.open(folder / "data")
    return base, prepare_rounds(folder / "rounds", base, SIZES)


def scale_of(data, folder):
    base, rounds = data
    scale = on_facts(scale_named("laptop", data=base.folder, vocab_size=300), 3000)
    return replace(scale, rounds=rounds, runs=folder / "runs", teaching=SIZES)


def kept(run, number, wobble) -> float:
    """Return the share of the base's recall that is left after a round."""
    lost = LOST[run.axes["train"]] * FACTOR[run.axes["remember"]] + (2 if run.axes["model"].endswith("n4096") else 0)
    lost += 1 if run.method == "dense" else 0
    return 1 - number * (lost + wobble) / 100


def write_run(folder, run) -> None:
    """Write the folder of a made-up run."""
    where, seed = folder.run_path(run.name), run.config.seed
    where.mkdir(parents=True)
    wobble = 0.1 * (seed % 3)
    recall = BASE_RECALL[run.method]
    lines = []
    if run.axes["stage"] == "base":
        lines = [{"step": 10, "seconds": 100.0, "training_flops": 1e13, "loss": 1.0}]
    else:
        number = run.axes["round"]
        best = {"tables": 1e-2, "low-rank": 9e-2, "everything": 1e-3}[run.axes["train"]]
        beside = abs(math.log10(run.axes["learning_rate"] / best))
        for step in (0, 1, 2):  # passes: nothing, half of the learning and of the loss, then all of it
            before, after = kept(run, max(0, number - 1), wobble), kept(run, number or 1, wobble)
            line = {"step": step, "seconds": 10.0 * step, "training_flops": 1e11 * step, "loss": 1.0}
            line |= {"recall": 0.2 * step, "nats_per_fact": 4.0 + beside, "base_nats_per_fact": 6.0}
            line["base_recall"] = recall * (before + (after - before) * step / 2)
            line |= {f"round-{earlier}_recall": 0.4 - 0.05 * (number - earlier) for earlier in range(1, number)}
            lines.append(line)
        (where / "teaching").mkdir()
        if run.axes["remember"] == "own-samples":
            drawn = {"sample_tokens": 1000, "seconds": 5.0}
            (where / "teaching/own-samples.json").write_text(json.dumps(drawn))
    text = "".join(json.dumps({"split": "validation", "num_tokens": 5} | line) + "\n" for line in lines)
    (where / "metrics.jsonl").write_text(text)
    asked = {} if run.config.teaching is None else {name: str(path) for name, path in run.config.teaching.asked.items()}
    (where / "config.json").write_text(json.dumps({"teaching": {"asked": asked}}))
    described = {"num_steps": 2, "versions": {}, "training_flops_per_token": {"total": 3000}}
    (where / "run.json").write_text(json.dumps(described))
    facts = {"validation": {"all": {"recall": recall, "nats": 6.0}, "bits_per_parameter": 0.1}}
    (where / "evaluation.json").write_text(json.dumps({"loss": 1.0, "facts": facts}))


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A study whose runs have ended, but for one of the last round."""
    folder = StudyFolder(tmp_path_factory.mktemp("lifelong") / "study")
    settings = StudySettings(study="lifelong", scale="laptop", data=str(data[0].folder))
    folder.begin(settings)
    for number, stage in enumerate(LIFELONG.stages(scale_of(data, folder.path))):
        for run in folder.stage(number, stage):
            if run.name != "moe-everything-data-round3-seed2":
                write_run(folder, run)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """The text of its report."""
    return write_study_report(LIFELONG, folder, command="x").read_text(encoding="utf-8")


def table(folder, name):
    with (folder.path / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rounds_are_of_airports_that_neither_the_base_nor_another_round_has(data) -> None:
    base, rounds = data
    assert [path.name for path in rounds] == ["tuning", "round-1", "round-2", "round-3"]
    sets = [TokenDataset.open(path).split("train").facts.fact_set for path in rounds]
    known = base.split("train").facts.fact_set
    names = [name for each in (known, *sets) for name in each.entities]
    assert len(names) == len(set(names)) == 40 + 4 * 3
    assert all(each.phrasings == known.phrasings for each in sets)
    assert prepare_rounds(rounds[0].parent, base, SIZES) == rounds


def test_each_way_is_tuned_and_then_taught_round_after_round(folder, data) -> None:
    runs = folder.planned_runs()
    stages = Counter(run.axes["stage"] for run in runs)
    ways = 2 * 6 + 2 * 9  # without and with a table: what is trained by what is remembered
    assert stages["base"] == 3 * 5  # and PEER with fewer experts
    assert stages["round"] == (ways + 2 + 1) * 3 * 3  # other numbers of experts, and rows by TF-IDF
    # Low-rank is best at an end of what is tried first, so that the next one is tried too.
    assert stages["tuning"] == 3 * (ways + 1) + 4 * 3 + 1
    losses = folder.losses()
    assert best_learning_rate(Way(method="dense", train="low-rank", remember="data"), losses) == pytest.approx(9e-2)
    assert best_learning_rate(Way(method="peer", train="everything", remember="nothing"), losses) == 1e-3
    assert losses["tune-peer-tables-data-lr0.01"] == pytest.approx((4.0 + 6.0) / 2)
    second = folder.planned_run("peer-tables-own-samples-round2-seed1").config
    first = folder.run_path("peer-tables-own-samples-round1-seed1")
    base = folder.run_path("base-peer-seed1")
    assert second.teaching.base == first
    assert [(memory.data, memory.teacher, memory.sample_tokens) for memory in second.teaching.remember] == [
        (first / "teaching/own-samples", base, None),
        (folder.run_path("peer-tables-own-samples-round2-seed1") / "teaching/own-samples", first, 32768),
    ]
    rounds = data[1]
    third = folder.planned_run("peer-everything-data-round3-seed0").config
    assert [memory.data for memory in third.teaching.remember] == [rounds[2], rounds[1], data[0].folder]
    assert third.teaching.asked == {"base": data[0].folder, "round-1": rounds[1], "round-2": rounds[2]}
    assert (third.optimizer.matrix_learning_rate, third.optimizer.table_learning_rate) == (1e-3, pytest.approx(3e-3))
    assert folder.planned_run("dense-everything-nothing-round1-seed0").config.teaching.remember == ()
    rows = folder.planned_run("peer-rows-nothing-round1-seed0").config
    assert (rows.teaching.train, rows.teaching.rows, rows.teaching.remember) == ("tables", SIZES.rows, ())
    assert rows.teaching.old_texts == (data[0].folder,)
    few = folder.planned_run("peer-n4096-tables-data-round1-seed0").config
    assert few.model.expert_layer.num_experts == 64**2
    assert few.optimizer.table_learning_rate == 1e-2
    assert few.teaching.base == folder.run_path("base-peer-n4096-seed0")


def test_weights_stay_where_another_run_begins_with_them(folder) -> None:
    kept = {run.name for run in folder.planned_runs() if run.keeps_checkpoint}
    stages = {run.axes["stage"] for run in folder.planned_runs() if run.name in kept}
    assert stages == {"base", "round"}
    assert "peer-tables-data-round2-seed0" in kept
    assert "peer-tables-data-round3-seed0" not in kept


def test_a_moved_study_finds_its_own_runs(folder, data, tmp_path) -> None:
    moved = StudyFolder(shutil.copytree(folder.path, tmp_path / "moved"))
    config = moved.planned_run("peer-tables-own-samples-round2-seed1").config
    assert config.teaching.base == moved.run_path("peer-tables-own-samples-round1-seed1")
    assert config.teaching.remember[1].teacher == config.teaching.base
    assert config.teaching.remember[0].data.is_relative_to(moved.path)
    assert config.teaching.asked["base"] == data[0].folder
    assert config.run == moved.run_path("peer-tables-own-samples-round2-seed1")
    assert moved.planned_run("peer-rows-nothing-round1-seed0").config.teaching.old_texts == (data[0].folder,)


def test_recall_after_the_last_round(folder, page) -> None:
    rows = {(row["model"], row["trained"], row["remembered by"]): row for row in table(folder, "rounds")}
    row = rows[("PEER", "tables", "data")]
    lost = [3 * (2 + wobble) for wobble in (0.0, 0.1, 0.2)]
    assert row["old facts before"] == "50.0"
    assert float(row["old facts after"]) == pytest.approx(50 * (1 - lost[1] / 100), abs=0.06)
    assert [row[f"round {number}"] for number in (1, 2, 3)] == ["30.0", "35.0", "40.0"]
    assert float(row["lost of the old, %"]) == pytest.approx(lost[1], abs=0.05)
    assert row["seeds"] == "3"
    assert row["learning rate"] == "0.01"
    assert rows[("MoE", "everything", "data")]["seeds"] == "2"
    triangle = [row for row in table(folder, "triangles") if (row["model"], row["remembered by"]) == ("PKM", "nothing")]
    of_tables = [row for row in triangle if row["trained"] == "tables"]
    assert [row["round 1"] for row in of_tables] == [MISSING, "40.0", "35.0", "30.0"]
    assert of_tables[0]["old facts"] == "40.0"


def test_verdicts(folder, page) -> None:
    lines = (folder.path / "report.md").read_text(encoding="utf-8").splitlines()
    verdicts = [line for line in lines if line.startswith("- ") and "**" in line]

    def verdict(*parts):
        (line,) = (line for line in verdicts if all(part in line for part in parts))
        return line

    # At equal learning, in the first round: 4 points against 8.
    assert "**holds** (\N{MINUS SIGN}4.0 points of the old recall" in verdict(
        "PEER (tables) forgets less than PEER (everything)", "remembering own samples, in the first round"
    )
    assert "**holds** (\N{MINUS SIGN}2.0 points" in verdict(
        "PEER (tables) forgets less than PEER (LoRA)", "own samples"
    )
    assert "**can't tell** (+0.0 points" in verdict("PEER (rows by TF-IDF) forgets less than PEER (tables)")
    # After three rounds: PEER's tables 3 x 4, dense 3 x (8 + 1).
    assert "**holds** (\N{MINUS SIGN}15.0 points" in verdict("less than dense (everything), remembering own samples")
    assert "**can't tell** (+0.0 points" in verdict(
        "After 3 rounds PEER (tables) forgets less than PKM (tables), remembering data"
    )
    assert "**unfinished**" in verdict("less than MoE (everything), remembering data")
    assert "**does not hold** (+6.0 points" in verdict("PEER (tables) forgets less remembering own samples than")
    assert "**holds** (\N{MINUS SIGN}6.0 points" in verdict(
        "65,536 experts forget less than 4,096 (tables), remembering data"
    )
    assert len([line for line in verdicts if "unfinished" in line]) == 1


def test_a_run_that_failed_for_good_is_not_waited_for(folder, data) -> None:
    name = "moe-everything-data-round3-seed2"
    (folder.path / "runs").joinpath(f"{name}.failed.json").write_text(json.dumps({"reason": "x", "diverged": True}))
    found = {finding.text: finding for finding in LIFELONG.findings(read_runs(folder)).findings}
    (folder.path / "runs" / f"{name}.failed.json").unlink()
    (text,) = (text for text in found if "less than MoE (everything), remembering data" in text)
    assert found[text].verdict == "holds"


def test_before_the_last_round_is_planned_nothing_after_it_is_said(folder, data, tmp_path) -> None:
    early = StudyFolder(shutil.copytree(folder.path, tmp_path / "early"))
    stages = early.path / "stages.json"
    stages.write_text(json.dumps(json.loads(stages.read_text())[:-2]))  # rounds 2 and 3 are not planned yet
    found = LIFELONG.findings(read_runs(early)).findings
    assert {finding.verdict for finding in found if finding.text.startswith("After 3 rounds")} == {"unfinished"}
    at_once = [finding.verdict for finding in found if finding.text.startswith("At equal learning")]
    assert set(at_once) == {"holds", "can't tell"}


def test_the_figures_show_each_way(folder, page) -> None:
    drawings = [drawing for section in LIFELONG.findings(read_runs(folder)).sections for drawing in section.drawings]
    peer = {drawing.caption: drawing.svg for drawing in drawings if drawing.caption.startswith("PEER:")}
    (maps,) = (svg for caption, svg in peer.items() if "after each round" in caption)
    titles = [f"{trained}, {remembered}" for trained in ("tables", "LoRA", "everything") for remembered in ("data",)]
    assert all(title in maps for title in (*titles, "rows by TF-IDF, nothing"))
    # The recall of the base before, and of the last round's facts after it.
    assert maps.count(">50<") == 10
    assert maps.count(">40<") >= 3 * 10
    (curves,) = (svg for caption, svg in peer.items() if "learned" in caption)
    assert "LoRA, own samples" in curves
    assert "rows by TF-IDF, nothing" in curves


def test_equal_learning_is_read_off_the_curves(folder, data) -> None:
    analysis = LifelongAnalysis(read_runs(folder))
    way = Way(method="peer", train="tables", remember="nothing")
    curve = analysis.curve(way, 0)
    assert curve == pytest.approx(np.array([(0, 100), (20, 94), (40, 88)]))
    other = replace(way, train="everything")
    name = "peer-everything-nothing-round1-seed0"
    metrics = folder.run_path(name) / "metrics.jsonl"
    before = metrics.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    lines[2]["recall"] = 0.3  # it learns less: the other is read half way between its passes
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = LifelongAnalysis(read_runs(folder)).forgotten_at_equal_learning(way, other)
    metrics.write_text(before)
    assert found.values[0] == pytest.approx(9 - 24)
    assert found.values[1] == pytest.approx((12 + 0.1) - (24 + 0.1))


def test_costs_count_own_samples(folder, page) -> None:
    rows = {(row["model"], row["trained"], row["remembered by"]): row for row in table(folder, "costs")}
    assert rows[("PEER", "tables", "data")]["seconds"] == "20"
    row = rows[("PEER", "tables", "own samples")]
    assert row["seconds"] == "25"
    assert row["passes"] == "2.0"
    assert row["FLOPs"] == f"{2e11 + 1000 * 1000:.2e}"
    assert row["FLOPs of a round, % of the base's"] == "2.0"


def test_the_command_of_a_run_teaches_its_base(folder) -> None:
    run = folder.planned_run("peer-tables-own-samples-round2-seed1")
    command = train_command(run.method, run.config).split()
    assert command[:3] == ["tinyexperts", "teach", str(run.config.teaching.base)]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--remember"] == "own-samples"
    assert options["--sample-tokens"] == "32768"
    assert options["--passes"] == "16"
    assert options["--table-learning-rate"] == "0.01"
    assert "--learning-rate" not in options
    assert options["--data"] == str(run.config.data)


@pytest.mark.parametrize("missing", ["base", "tuning"])
def test_ways_without_what_they_need_are_left_out(data, tmp_path, missing) -> None:
    stages = LIFELONG.stages(scale_of(data, tmp_path))
    losses = {run.name: 1.0 for run in stages[0]({})}
    if missing == "base":
        losses = {name: loss for name, loss in losses.items() if "-peer-seed" not in name}
    tuning, no_tables = stages[1](losses), ("tune-peer-tables", "tune-peer-rows")
    losses |= {run.name: 1.0 for run in tuning if missing == "base" or not run.name.startswith(no_tables)}
    first = stages[3](losses)
    models = {(run.axes["model"], run.axes["train"]) for run in first}
    assert ("dense", "everything") in models
    assert ("peer", "tables") not in models
    assert (("peer", "everything") in models) == (missing == "tuning")


def test_bad_input(data, tmp_path, run_cli) -> None:
    base, rounds = data
    given = ("study", "lifelong", "--scale", "minute", "--output", tmp_path / "study", "--data", base.folder)
    other = tmp_path / "other"
    prepare(PrepareConfig(corpus="airports", max_entities=5, vocab_size=300, output=other, every_fact=True))
    text = tmp_path / "text"
    (tmp_path / "t.txt").write_text("a b c d e f\n\n" * 40)
    tokenizer = str(base.folder / "tokenizer.json")
    for number in range(3):
        (tmp_path / f"t{number}.txt").write_text(f"some words {number} " * 30)
    files = tuple(tmp_path.glob("t*.txt"))
    prepare(PrepareConfig(files=files, output=text, tokenizer=tokenizer, validation_fraction=0.5))
    for more, refusal in (
        ((rounds[0],), "more_data must be two data sets at least, to tune on and to teach, got 1"),
        ((rounds[0], other), "must have the tokenizer of"),
        ((rounds[0], text), "data sets that are taught must be of facts"),
    ):
        code, _, err = run_cli(*given, "--more-data", *more)
        assert code == 2
        assert refusal in " ".join(err.split())
        assert not (tmp_path / "study").exists()
    wide = tmp_path / "wide"
    prepare(PrepareConfig(corpus="airports", attributes=("city",), vocab_size=300, output=wide))
    code, _, err = run_cli(*given[:-1], wide)
    assert code == 2
    assert "3 rounds need 24 airports that" in " ".join(err.split())
    few = tmp_path / "few"
    prepare(PrepareConfig(facts=_colors(tmp_path), key="name", output=few, vocab_size=300))
    code, _, err = run_cli(*given[:-1], few)
    assert code == 2
    assert "color" in err
    assert not (tmp_path / "study").exists()


def _colors(tmp_path) -> Path:
    path = tmp_path / "colors.csv"
    path.write_text("name,color\n" + "".join(f"k{n},red\n" for n in range(30)))
    return path


def test_a_dry_run_leaves_nothing(data, tmp_path, run_cli) -> None:
    given = ("study", "lifelong", "--scale", "minute", "--output", tmp_path / "study", "--data", data[0].folder)
    code, out, _ = run_cli(*given, "--dry-run")
    assert code == 0
    assert "peer-tables-own-samples-round2-seed1" in "".join(out.split())
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_small_study_from_its_first_run_to_its_report(data, tmp_path, monkeypatch, run_cli) -> None:
    sizes = TeachingSizes(
        num_entities=4,
        passes=2,
        sample_tokens=2048,
        rows=20,
        num_rounds=2,
        remember=("own-samples",),
        experts=(16**2,),
    )

    def tiny(name, *, data, vocab_size):
        scale = scale_named(name, data=data, vocab_size=vocab_size)
        layers = {method: scale.layers[method] for method in ("dense", "peer")}
        return replace(scale, layers=layers, seeds=(0,), teaching=sizes)

    monkeypatch.setattr("tinyexperts.study.run_study.scale_named", tiny)
    given = ("study", "lifelong", "--scale", "minute", "--output", tmp_path / "study", "--data", data[0].folder)
    code, _, err = run_cli(*given)
    assert code == 0, err
    folder = StudyFolder(tmp_path / "study")
    assert all(folder.status_of(name).state == "done" for name in folder.planned_names())
    ways = {row["model"] + row["trained"] for row in table(folder, "rounds")}
    assert ways == {
        *("denseLoRA", "denseeverything", "PEERtables", "PEERLoRA", "PEEReverything", "PEERrows by TF-IDF"),
        "PEER with 256 expertstables",
    }
    second = folder.run_path("peer-tables-own-samples-round2-seed0")
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "validation"][-1]
    assert {"recall", "base_recall", "round-1_recall"} <= last.keys()
    assert (folder.run_path("peer-tables-own-samples-round1-seed0") / "teaching/own-samples").is_dir()
    assert not (second / "checkpoints").exists()
    before = {path: path.stat().st_mtime_ns for path in (folder.path / "runs").rglob("*.json")}
    assert run_cli(*given)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (folder.path / "runs").rglob("*.json")} == before
