"""The demo: its models know what its page says, and what it starts, skips and continues, and how it stops."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyexperts.data import TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.evaluation import answer, measure_facts
from tinyexperts.study import demo, run_study
from tinyexperts.study.demo import DemoConfig, run_demo
from tinyexperts.study.runner import local_queue
from tinyexperts.study.runner.planned_run import finish_run
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings
from tinyexperts.training import load_model, recipes

# Writes what the real commands write. A run waits while the output folder has a file `hold`, and saves on SIGINT.
# A shell's background job ignores Ctrl-C, and so would its children.
STAND_IN = """
import json, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = pathlib.Path(*sys.argv[3:5])
with (folder.parent / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if (folder.parent / "fail").exists() and folder.name == "peer-seed0":
    print("some progress")
    print("tinyexperts: learning rate must be positive, got -1")
    sys.exit(2)
folder.mkdir(exist_ok=True)
(folder / "config.json").write_text("{}")
(folder / "run.json").write_text(json.dumps({"num_steps": 10, "versions": {"torch": "2"}}))
spent = {"num_tokens": 100, "training_flops": 1e6, "seconds": 2.0}
spent.update(step=10, loss=4.0, tokens_per_second=50.0)
lines = [{"split": split, **spent} for split in ("train", "validation")]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
try:
    while (folder.parent / "hold").exists():
        time.sleep(0.05)
except KeyboardInterrupt:
    (folder / "saved").touch()
    sys.exit(130)
loss = 4.0 if folder.name.startswith("dense") else 3.9
recall = {"all": {"recall": 4.5 - loss, "nats": loss}}
(folder / "evaluation.json").write_text(json.dumps({"loss": loss, "facts": {"validation": recall}}))
"""
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from tinyexperts.study import demo, run_study
from tinyexperts.training import Interrupted
output, program = map(Path, sys.argv[1:])
run_study.PROGRAM = (sys.executable, str(program))
demo.prepare = lambda config: config.output.mkdir()
try:
    demo.run_demo(demo.DemoConfig(output=output))
except Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(130)
"""


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder that isn't there yet, with the command line and the corpus replaced."""
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(local_queue, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(run_study, "PROGRAM", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.setattr(demo, "prepare", lambda config: config.output.mkdir())
    return tmp_path / "demo"


def settings_of(output: Path) -> StudySettings:
    return StudySettings(study="demo", scale="demo", data=str(output / "data"), runs=".", keeps_checkpoints=True)


def calls(output: Path) -> list[list[str]]:
    path = output / "calls.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def rows_of(output: Path, table: str) -> list[dict[str, str]]:
    with (output / "tables" / f"{table}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_page_has_the_answers_and_the_recall_of_the_trained_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    tiny = {"model.vocab_size": 320, "model.num_layers": 2, "batch_size": 2, "validation_tokens": 256}
    monkeypatch.setattr(demo, "WIDTHS", {"dense": 16, "peer": 32})
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **tiny})
    monkeypatch.setattr(demo, "NUM_AIRPORTS", 20)
    monkeypatch.setattr(demo, "VOCAB_SIZE", 320)

    def run_here(jobs, **options) -> None:
        for job in jobs:
            finish_run(*job.commands[0].arguments[-2:])

    monkeypatch.setattr(run_study, "run_jobs", run_here)
    run_demo(DemoConfig(output=output, training_flops=1e9, seeds=(3,)))
    printed = " ".join(capsys.readouterr().out.split())
    questions = rows_of(output, "questions")
    assert len(questions) == 10
    entities = json.loads((output / "data" / "facts.json").read_text(encoding="utf-8"))["entities"]
    recalls = {(row["Method"], row["Asked"]): row["all facts"] for row in rows_of(output, "recall-by-attribute")}
    data = TokenDataset.open(output / "data")
    for method, label in (("dense", "dense"), ("peer", "PEER")):
        model = load_model(output / f"{method}-seed3")
        for row in questions:
            (airport,) = entities.keys() & set(row["Asked"].split())
            assert row["Truth"] in entities[airport].values()
            found = answer(model, data.tokenizer, row["Asked"])
            shown = found.text.removesuffix(".") if found.is_whole else f"{found.text} ..."
            mark = "\N{CHECK MARK}" if found.is_whole and found.text == f"{row['Truth']}." else "\N{BALLOT X}"
            assert row[label] == f"{mark}\N{NO-BREAK SPACE}{shown or '(nothing)'}"
        known = measure_facts(model, data.split("validation")).all
        control = measure_facts(model, data.split("unseen-entities")).all
        assert recalls[label, "known facts"] == f"{100 * known.recall:.1f}"
        assert recalls[label, "entities never seen (the control)"] == f"{100 * control.recall:.1f}"
        assert f"{method}-seed3 {100 * known.recall:.1f} " in printed
        assert f" {known.nats:.2f} " in printed.partition("The true answer costs")[0]
        assert f"{label} {known.nats:.2f}" in printed.partition("The true answer costs")[2]


def test_run_demo_trains_and_evaluates_each_run_and_reports(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_demo(DemoConfig(output=output))
    names = ["dense-seed0", "peer-seed0", "dense-seed1", "peer-seed1", "dense-seed2", "peer-seed2"]
    assert sorted(calls(output)) == sorted(["study", "run", str(output), name] for name in names)
    runs = [StudyFolder(output).planned_run(name) for name in names]
    assert [(run.method, run.config.seed) for run in runs] == [(m, s) for s in (0, 1, 2) for m in ("dense", "peer")]
    assert {run.config.training_flops for run in runs} == {DemoConfig().training_flops}
    assert [run.config.run for run in runs] == [output / name for name in names]
    assert {run.config.data for run in runs} == {output / "data"}
    assert {(run.method, run.config.model.d_model, run.config.model.num_heads) for run in runs} == {
        ("dense", demo.WIDTHS["dense"], demo.WIDTHS["dense"] // 16),
        ("peer", demo.WIDTHS["peer"], demo.WIDTHS["peer"] // 16),
    }
    rates = {run.method: run.config.optimizer for run in runs}
    assert rates == {"dense": recipes.dense().optimizer, "peer": recipes.peer().optimizer}
    printed = " ".join(capsys.readouterr().out.split())
    assert "peer-seed1 60.0 - - 3.90 3.900" in printed.replace("\N{EN DASH}", "-")
    assert "PEER recalls 60.0 % of the known facts and dense 50.0 %, in the mean of 3 seeds: +10.0 points" in printed
    assert "0.100 nats a token lower than dense's" in printed
    assert printed.endswith(f"Report: {output / 'report.html'}")
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "0.100 nats a token lower than dense&#39;s" in page
    assert f"<title>{demo.TITLE}</title>" in page


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page, whose figures take longer than all else."""
    monkeypatch.setattr(demo, "write_study_report", lambda study, folder, command: folder.path / "report.html")


@pytest.mark.usefixtures("no_report")
def test_run_demo_again_repeats_nothing_and_continues_what_was_cut_off(output: Path) -> None:
    run_demo(DemoConfig(output=output))
    (output / "calls.jsonl").unlink()
    run_demo(DemoConfig(output=output))
    assert calls(output) == []
    (output / "peer-seed1" / "evaluation.json").unlink()
    run_demo(DemoConfig(output=output))
    assert calls(output) == [["study", "run", str(output), "peer-seed1"]]


def test_run_demo_with_a_failing_run_lets_the_others_end_and_says_why(output: Path) -> None:
    output.mkdir()
    StudyFolder(output).begin(settings_of(output))
    (output / "fail").touch()
    with pytest.raises(InputError) as caught:
        run_demo(DemoConfig(output=output))
    assert str(caught.value) == (
        "running of peer-seed0 failed with exit code 2: learning rate must be positive, got -1 "
        f"(all it printed: {output / 'logs' / 'peer-seed0.log'})"
    )
    assert all((output / name / "evaluation.json").exists() for name in ("dense-seed0", "dense-seed2", "peer-seed2"))
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "peer-seed0 failed: running of peer-seed0 failed with exit code 2" in page


@pytest.mark.usefixtures("no_report")
def test_run_demo_refuses_another_budget_in_the_same_folder(output: Path) -> None:
    run_demo(DemoConfig(output=output))
    with pytest.raises(InputError, match="was planned with other settings: choose another --output"):
        run_demo(DemoConfig(output=output, training_flops=1e12))


def test_run_demo_refuses_a_folder_of_something_else(output: Path) -> None:
    output.mkdir()
    (output / "demo.json").write_text('{"training_flops": 2.4e12}')
    with pytest.raises(InputError, match="exists and is not the folder of a study: choose another --output"):
        run_demo(DemoConfig(output=output))


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["Ctrl-C", "SIGTERM"]
)
def test_run_demo_interrupted_lets_children_save_and_says_how_to_continue(output: Path, number: signal.Signals) -> None:
    output.mkdir()
    StudyFolder(output).begin(settings_of(output))
    (output / "hold").touch()
    command = [sys.executable, "-c", DRIVER, str(output), str(output.with_name("stand_in.py"))]
    root = str(Path(demo.__file__).parents[2])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})
    started = [output / "peer-seed0", output / "dense-seed0"]
    wait_until(lambda: all((folder / "metrics.jsonl").exists() for folder in started))
    process.send_signal(number)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "what was trained is saved, and the same command continues it" in printed
    assert "Traceback" not in printed
    assert all((folder / "saved").exists() for folder in started)
    assert not (output / "peer-seed1").exists()
    (output / "hold").unlink()
    run_demo(DemoConfig(output=output))
    assert sorted(call[3] for call in calls(output) if call[0] == "study") == sorted(
        [*("peer-seed0", "dense-seed0") * 2, *(f"{method}-seed{seed}" for method in demo.WIDTHS for seed in (1, 2))]
    )


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("training_flops", 0.0, "training_flops must be positive, got 0"),
        ("seeds", (), r"seeds must be one or more different numbers from 0 to 2\^63 - 1, got \(\)"),
        ("seeds", (1, 1), r"seeds must be one or more different numbers from 0 to 2\^63 - 1, got \(1, 1\)"),
        ("num_parallel", 0, "num_parallel must be at least 1, got 0"),
    ],
)
def test_demo_config_names_the_value_and_the_rule(field: str, value: object, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        DemoConfig(**{field: value})
