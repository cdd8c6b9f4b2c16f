"""The demo with a stand-in for the command line: what it starts, skips and continues, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinyexperts.errors import InputError
from tinyexperts.study import demo, run_study
from tinyexperts.study.demo import DemoConfig, run_demo
from tinyexperts.study.runner import local_queue
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings

# Writes what the real commands write. A run waits while the output folder has a file `hold`, and saves on SIGINT.
# A shell's background job ignores Ctrl-C, and so would its children.
STAND_IN = """
import json, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
verb, rest = sys.argv[1], sys.argv[2:]
folder = pathlib.Path(rest[1], rest[2]) if verb == "study" else pathlib.Path(rest[0])
with (folder.parent / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if verb == "study":
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
    (folder / "evaluation.json").write_text(json.dumps({"loss": loss, "perplexity": 50.0, "bits_per_byte": 1.7}))
else:
    path = folder / "samples.json"
    samples = json.loads(path.read_text()) if path.exists() else []
    samples.append({"prompt": rest[rest.index("--prompt") + 1], "completion": "x"})
    path.write_text(json.dumps(samples))
"""
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from types import SimpleNamespace
from tinyexperts.study import demo, run_study
from tinyexperts.training import Interrupted
output, program = map(Path, sys.argv[1:])
demo.PROGRAM = run_study.PROGRAM = (sys.executable, str(program))
demo.prepare = lambda config: config.output.mkdir()
demo.TokenDataset.open = lambda path, **options: SimpleNamespace(split=lambda name: SimpleNamespace(num_tokens=10**9))
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
    data = SimpleNamespace(split=lambda name: SimpleNamespace(num_tokens=10**9))
    monkeypatch.setattr(local_queue, "POLL_SECONDS", 0.02)
    for module in (demo, run_study):
        monkeypatch.setattr(module, "PROGRAM", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.setattr(demo, "prepare", lambda config: config.output.mkdir())
    monkeypatch.setattr(demo.TokenDataset, "open", lambda path, **options: data)
    return tmp_path / "demo"


def settings_of(output: Path) -> StudySettings:
    return StudySettings(study="demo", scale="demo", data=str(output / "data"), runs=".", keeps_checkpoints=True)


def calls(output: Path) -> list[list[str]]:
    path = output / "calls.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_run_demo_trains_evaluates_and_samples_each_run_and_reports(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_demo(DemoConfig(output=output))
    done = calls(output)
    names = ["peer-seed0", "dense-seed0", "peer-seed1", "dense-seed1"]
    assert sorted(call[3] for call in done if call[:3] == ["study", "run", str(output)]) == sorted(names)
    runs = [StudyFolder(output).planned_run(name) for name in names]
    assert [(run.method, run.config.seed) for run in runs] == [("peer", 0), ("dense", 0), ("peer", 1), ("dense", 1)]
    assert {run.config.training_flops for run in runs} == {DemoConfig().training_flops}
    assert [run.config.run for run in runs] == [output / name for name in names]
    assert sum(call[0] == "generate" for call in done) == 8
    printed = capsys.readouterr().out
    assert "peer-seed1" in printed
    assert "0.100 nats a token lower than dense's" in " ".join(printed.split())
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "0.100 nats a token lower than dense&#39;s" in page
    assert "<title>PEER and its dense twin at equal training FLOPs</title>" in page
    assert page.count('class="sample"') == 8


def test_run_demo_again_repeats_nothing_and_continues_what_was_cut_off(output: Path) -> None:
    run_demo(DemoConfig(output=output))
    (output / "calls.jsonl").unlink()
    run_demo(DemoConfig(output=output))
    assert calls(output) == []
    (output / "peer-seed1" / "evaluation.json").unlink()
    run_demo(DemoConfig(output=output))
    assert calls(output) == [["study", "run", str(output), "peer-seed1"]]


def test_run_demo_samples_a_prompt_that_was_not_asked_for_before(output: Path) -> None:
    run_demo(DemoConfig(output=output))
    (output / "calls.jsonl").unlink()
    run_demo(DemoConfig(output=output, prompts=(*DemoConfig().prompts, "while ")))
    assert [call[call.index("--prompt") + 1] for call in calls(output)] == ["while "] * 4


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
    assert all((output / name / "evaluation.json").exists() for name in ("dense-seed0", "dense-seed1", "peer-seed1"))
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "peer-seed0 failed: running of peer-seed0 failed with exit code 2" in page


def test_run_demo_refuses_another_budget_in_the_same_folder(output: Path) -> None:
    run_demo(DemoConfig(output=output))
    with pytest.raises(InputError, match="was planned with other settings: choose another --output"):
        run_demo(DemoConfig(output=output, training_flops=1e12))


def test_run_demo_refuses_a_folder_of_something_else(output: Path) -> None:
    output.mkdir()
    (output / "demo.json").write_text('{"training_flops": 2.4e12}')
    with pytest.raises(InputError, match="exists and is not the folder of a study: choose another --output"):
        run_demo(DemoConfig(output=output))


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
        [*("peer-seed0", "dense-seed0") * 2, "peer-seed1", "dense-seed1"]
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
