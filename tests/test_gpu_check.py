"""benchmarks/gpu_check.py without a GPU: kernels are compiled and not run, and what times them runs on a CPU."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check_parts import compile_first, correctness, device_facts, graphs, times, training, tuning
from gpu_check_parts.session import Session, Unit

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu_check.py"


class _Event:
    """A moment of the CPU's."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A run on a device that is the CPU in truth."""
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    pretended = Session("gpu", tmp_path, seconds=60)
    pretended.device = torch.device("cpu")
    monkeypatch.setattr("gpu_check_parts.session._FLUSHED_BYTES", 1)
    return pretended


@pytest.fixture
def compiled(session, request, monkeypatch):
    """The operators take the code for GPUs, whose kernels are compiled and not run."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from dry_driver import dry_driver
    from gpu_code_on_cpu import gpu_code_on_cpu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))
    with dry_driver("sm_90"), gpu_code_on_cpu(checked=False):
        yield


def test_every_phase_has_work_on_a_device(session):
    for part in (correctness, device_facts, times, graphs, training, tuning):
        units = part.units(session)
        assert units
        assert len({unit.name for unit in units}) == len(units)
    (unit,) = compile_first.units(session, ["correct"], "sm_90")
    assert unit.name == "compilation for sm_90"


def test_times_of_the_operators(session, compiled, monkeypatch):
    monkeypatch.setattr(times, "TOKENS", (8, 1))
    monkeypatch.setattr(times, "_RETRIEVED", 4)
    session.results[device_facts.COPY] = 4.0
    found = times._operators(32, 64, torch.float32, session)
    assert list(found) == ["M = 8", "M = 1"]
    forward = found["M = 8"]["forward"]
    assert forward["TB/s"] == pytest.approx(8 * 4 * 2 * 32 * 4 / forward["ms"] / 1e9, rel=1e-2)
    assert forward["of the copy"] == pytest.approx(forward["TB/s"] / 4, rel=1e-2)
    assert found["M = 1"]["plain torch, forward, over ours"] > 0
    assert set(times._retrieval(64 * 64, 8, session)) == {"ms", "plain torch over ours", "the scores alone, ms"}


def test_a_table_that_does_not_fit_is_left_out(session, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1000))
    assert times._operators(32, 64, torch.float32, session) == "left out: the table and its moments don't fit"


@pytest.mark.slow
def test_layers_and_their_rivals(session, monkeypatch):
    def rivals(dim, num_experts):
        left_out = ("torch.compile", "SparseAdam", "a vector")
        return [(name, make) for name, make in times_rivals(dim, num_experts) if not any(x in name for x in left_out)]

    def missing():
        raise ImportError("no such layer")

    times_rivals = times._rivals
    monkeypatch.setattr(times, "_rivals", lambda *sizes: [*rivals(*sizes), ("none", missing)])
    found = times._layers(16, 64, 8, session)
    assert found["ours"]["step, ms"] > 0
    dense = found["dense of 4 D neurons"]
    assert dense["step over ours"] == pytest.approx(dense["step, ms"] / found["ours"]["step, ms"], rel=1e-2)
    assert found["none"] == "left out: no such layer"
    assert "step, ms" not in times._layers(16, 64, 1, session)["ours"]


@pytest.mark.slow
def test_searched_constants(session, compiled, monkeypatch):
    # What was not run has no numbers to compare.
    monkeypatch.setattr(torch.testing, "assert_close", lambda *_, **__: None)
    (unit, *_) = tuning.units(session)
    found = tuning._tune((8, 64, 128, 4), torch.float32, session)
    assert found["usual (rows, warps)"] == (4, 1)
    assert len(found["forward: ms, rows, warps"]) == tuning._NUM_SHOWN
    assert len(found["backward as usual: ms"]) == 1
    assert unit.name.startswith("tuning, M = 4096, D = 256, bfloat16")


def test_a_graph_that_replays_nothing_is_wrong(session, monkeypatch):
    class Nothing:
        def replay(self) -> None:
            pass

        def wait_stream(self, stream: object) -> None:
            pass

    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    wrong = graphs._capture("numbers", lambda session: lambda: (torch.ones(3),), session)
    assert wrong.startswith("WRONG")
    kept = torch.zeros(3)
    right = graphs._capture("kept", lambda session: lambda: (kept,), session)
    assert right.startswith("captured")
    assert session.wrong == ["numbers"]


def test_the_losses_of_whole_models(session, monkeypatch):
    monkeypatch.setattr(training, "_STEPS", 2)
    found = training._losses(session, ("cpu", "cpu"))
    assert found["largest difference"] == 0
    assert found["first and last loss"][0] > 1


@pytest.fixture
def run_script(tmp_path, request):
    """A function that runs the script; returns its process."""
    cache = request.config.cache.mkdir("triton")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"TRITON_CACHE_DIR": str(cache), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.slow
def test_a_share_of_a_dry_run(run_script, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    process = run_script("--dry", "--phases", "correct", "--share", "9/60")
    assert process.returncode == 0, process.stdout + process.stderr
    written = json.loads((tmp_path / "out/gpu_check.json").read_text())
    assert written["summary"] == {"wrong": [], "broken": []}
    assert written["launches"] > written["kernels"] >= 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "torch finds no CUDA device: use --dry, or --tiny"),
        (["--tiny"], "--tiny wants TRITON_INTERPRET=1"),
    ],
)
def test_what_a_machine_can_t_do_is_said(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert message in capsys.readouterr().err


def test_a_unit_that_breaks_is_written_and_the_others_run(session):
    def broken(session: Session) -> None:
        raise RuntimeError("no kernel image")

    units = {"facts": [Unit("first", broken), Unit("second", lambda session: 2)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "units_of", lambda phase, *_: units[phase])
        assert not gpu_check.run(session, ["facts"], share=(0, 1), target=None)
        assert "no kernel image" in session.results["BROKEN: first"]
        assert session.results["second"] == 2
        session.seconds = 0
        gpu_check.run(session, ["facts"], share=(0, 1), target=None)
    assert session.results["left out for want of time"] == ["first", "second"]
