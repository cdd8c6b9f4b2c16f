"""The demo's conduct with a stand-in for the command line: what it starts, skips and continues, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyexperts.errors import InputError
from tinyexperts.study import demo
from tinyexperts.study.demo import DemoConfig, run_demo
from tinyexperts.study.runner import local_queue as run_queue

# Writes what the real commands write. `train` waits while the output folder has a file `hold`, and saves on SIGINT.
# A shell's background job ignores Ctrl-C, and so would its children.
STAND_IN = """
import json, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
verb, rest = sys.argv[1], sys.argv[2:]
folder = pathlib.Path(rest[rest.index("--run") + 1] if verb == "train" else rest[0])
with (folder.parent / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if verb == "train":
    if (folder.parent / "fail").exists() and folder.name == "peer-seed0":
        print("some progress")
        print("tinyexperts: learning rate must be positive, got -1")
        sys.exit(2)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps({"num_steps": 10}))
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
elif verb == "evaluate":
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
from tinyexperts.study import demo
from tinyexperts.study.runner import local_queue as run_queue
output = Path(sys.argv[1])
demo.PROGRAM = (sys.executable, str(output / "stand_in.py"))
demo.prepare = lambda config: config.output.mkdir()
demo.TokenDataset.open = lambda path: None
try:
    demo.run_demo(demo.DemoConfig(output=output))
except demo.Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(130)
"""


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty output folder, with the command line and the corpus replaced."""
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(run_queue, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(demo, "PROGRAM", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.setattr(demo, "prepare", lambda config: config.output.mkdir())
    monkeypatch.setattr(demo.TokenDataset, "open", lambda path: None)
    return tmp_path


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
    trained = [call for call in done if call[0] == "train"]
    assert sorted((call[1], call[call.index("--seed") + 1]) for call in trained) == [
        *(("dense", "0"), ("dense", "1")),
        *(("peer", "0"), ("peer", "1")),
    ]
    assert {float(call[call.index("--training-flops") + 1]) for call in trained} == {DemoConfig().training_flops}
    assert all("--resume" not in call for call in trained)
    assert sum(call[0] == "evaluate" for call in done) == 4
    assert sum(call[0] == "generate" for call in done) == 8
    printed = capsys.readouterr().out
    assert "peer-seed1" in printed
    assert "0.100 nats a token lower than dense's" in " ".join(printed.split())
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "0.100 nats a token lower than dense&#39;s" in page


def test_run_demo_again_repeats_nothing_and_continues_what_was_cut_off(output: Path) -> None:
    run_demo(DemoConfig(output=output))
    (output / "calls.jsonl").unlink()
    run_demo(DemoConfig(output=output))
    assert calls(output) == []
    (output / "peer-seed1" / "evaluation.json").unlink()
    run_demo(DemoConfig(output=output))
    train, evaluate = calls(output)
    assert train[:2] == ["train", "peer"]
    assert train[-1] == "--resume"
    assert evaluate == ["evaluate", str(output / "peer-seed1")]


def test_run_demo_with_a_failing_run_lets_the_others_end_and_says_why(output: Path) -> None:
    (output / "fail").touch()
    with pytest.raises(InputError) as caught:
        run_demo(DemoConfig(output=output))
    assert str(caught.value) == (
        "training of peer-seed0 failed with exit code 2: learning rate must be positive, got -1 "
        f"(all it printed: {output / 'logs' / 'peer-seed0.log'})"
    )
    assert all((output / name / "evaluation.json").exists() for name in ("dense-seed0", "dense-seed1", "peer-seed1"))
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "peer-seed0: there is no such folder, so the run never started." in page


def test_run_demo_refuses_another_budget_in_the_same_folder(output: Path) -> None:
    run_demo(DemoConfig(output=output))
    before = f"{DemoConfig().training_flops:.1f}"
    with pytest.raises(InputError, match=rf"was begun with .*{before}.*, got .*1000000000000.*choose another --output"):
        run_demo(DemoConfig(output=output, training_flops=1e12))


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["Ctrl-C", "SIGTERM"]
)
def test_run_demo_interrupted_lets_children_save_and_says_how_to_go_on(output: Path, number: signal.Signals) -> None:
    (output / "hold").touch()
    command = [sys.executable, "-c", DRIVER, str(output)]
    root = str(Path(demo.__file__).parents[2])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})
    started = [output / "peer-seed0", output / "dense-seed0"]
    wait_until(lambda: all((folder / "metrics.jsonl").exists() for folder in started))
    process.send_signal(number)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "what was trained is saved, and the same command again goes on from there" in printed
    assert "Traceback" not in printed
    assert all((folder / "saved").exists() for folder in started)
    assert not (output / "peer-seed1").exists()
    (output / "hold").unlink()
    run_demo(DemoConfig(output=output))
    resumed = {call[1]: "--resume" in call for call in calls(output) if call[0] == "train" and "0" in call[7]}
    assert resumed == {"peer": True, "dense": True}


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
