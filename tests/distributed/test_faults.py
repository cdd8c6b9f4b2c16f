"""Ranks that are killed, that hang, that can't write: nothing is lost, and what happened is told."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from faulty_ranks import (
    be_refused,
    die_while_writing,
    hang_at,
    have_no_room,
    have_no_room_for_metrics,
    have_other_data,
    see_time_outs,
    start_again,
    train_under_an_agent,
)
from forkserver import CONTEXT
from ranks import environment, free_port, on_ranks, train_on_ranks
from safetensors.torch import load_file

from tinyexperts.errors import InputError
from tinyexperts.training import LostRank, checkpoint_files, load_model, train
from tinyexperts.training.checkpoint import checkpoints
from tinyexperts.training.config import with_settings
from tinyexperts.training.run_folder import read_config

CLOCK = {"seconds", "tokens_per_second", "flops_per_second"}


@pytest.fixture
def command(tiny_data):
    """A function that makes the command line of a run."""

    def make(run: Path, *more: object) -> list[str]:
        options = {
            "run": run,
            "data": tiny_data,
            "threads": 1,
            "training-flops": None,
            "num-steps": 80,
            "log-every": 3,
            "checkpoint.every": 7,
            "validation-every": 50,
            "validation-tokens": 64,
            "model.vocab-size": 300,
            "model.context-length": 16,
            "model.d-model": 128,
            "model.num-layers": 2,
            "model.expert-layer.num-experts": 64,
            "model.expert-layer.experts-per-head": 3,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return ["train", "peer", *words, "--no-progress", *map(str, more)]

    return make


@contextmanager
def started(module, more_environment=()):
    """A module run as a program; killed where it is left."""
    with subprocess.Popen(
        [sys.executable, "-m", *module],
        env=os.environ | dict(more_environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def worker(launchers, rank):
    """The process of a rank that one of the launchers has started."""
    parents = {str(launcher.pid) for launcher in launchers}
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1] if folder.name.isdigit() else ""
            if parent in parents and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except OSError:
            continue  # it ended meanwhile
    raise AssertionError(f"no process of rank {rank}")


def outcome(run):
    """Metrics without clocks, and the last checkpoint."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tensors = {path.name: load_file(path) for path in checkpoints(run)[-1].glob("*.safetensors")}
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows], tensors


@pytest.mark.slow
def test_a_rank_killed_at_a_random_step_is_started_again_and_nothing_is_lost(make_config, tmp_path):
    options = {"num_steps": 80, "log_every": 3, "validation_every": 50, "checkpoint.every": 7}
    options |= {"model": {"d_model": 128}, "distributed.mesh": (1, 2)}
    hurt, whole = (make_config(run=tmp_path / name, **options) for name in ("hurt", "whole"))
    kill_at, victim = random.Random(time.time_ns()).randint(1, 20), time.time_ns() % 2
    agent = CONTEXT.Process(target=train_under_an_agent, args=(hurt, victim, kill_at))
    agent.start()
    agent.join(300)
    assert agent.exitcode == 0, f"rank {victim} was killed at line {kill_at}"
    assert (tmp_path / "started again").exists()
    train_on_ranks([whole], 2)
    assert_same_end(hurt.run, whole.run)


@pytest.mark.slow  # each process imports torch
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_torchrun_starts_the_command_again_when_a_rank_was_killed(wait_for_lines, command, tmp_path, num_nodes):
    """Each node has its own torchrun, and shares no table with the other."""
    hurt = tmp_path / "hurt"
    torchrun = ["torch.distributed.run", "--nnodes", str(num_nodes), "--nproc-per-node", str(2 // num_nodes)]
    torchrun += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    hosts = [["--rdzv-conf", f"is_host={int(node == 0)}", "-m", "--", "tinyexperts"] for node in range(num_nodes)]
    kill_at, victim = random.Random(time.time_ns()).randint(1, 20), time.time_ns() % 2
    with ExitStack() as stack:
        launchers = [stack.enter_context(started([*torchrun, *host, *command(hurt)])) for host in hosts]
        wait_for_lines(hurt, kill_at, launchers[0])
        os.kill(worker(launchers, victim), signal.SIGKILL)
        said = [launcher.communicate(timeout=180)[1] for launcher in launchers]
    ended = [launcher.returncode for launcher in launchers]
    assert not any(ended), f"rank {victim} was killed at line {kill_at}: {said}"
    whole = with_settings(
        read_config(hurt), {"run": tmp_path / "whole", "distributed.mesh": (num_nodes, 2 // num_nodes)}
    )
    train_on_ranks([whole], 2)
    assert_same_end(hurt, whole.run)


def assert_same_end(got, whole):
    (metrics, tensors), (expected_metrics, expected) = outcome(got), outcome(whole)
    assert metrics == expected_metrics
    assert tensors.keys() == expected.keys()
    for file, parts in expected.items():
        for name, tensor in parts.items():
            assert torch.equal(tensors[file][name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_stopped_saves_and_says_how_to_go_on(wait_for_lines, command, tmp_path, number):
    """Though torchrun takes the signal, and the ranks have it from there."""
    run = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "--standalone"]
    with started([*torchrun, "-m", "--", "tinyexperts", *command(run, "--num-steps", 5000)]) as launcher:
        wait_for_lines(run, 5, launcher)
        launcher.send_signal(number)
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    (saved,) = re.findall(r"saved \S+ at step (\d+); to go on: (torchrun .*)", said.replace("tinyexperts: ", ""))[:1]
    assert [path.name for path in checkpoints(run)][-1] == f"step-{int(saved[0]):08d}"
    goes_on = shlex.split(saved[1])
    assert goes_on[:7] == ["torchrun", "--nproc-per-node", "2", "--max-restarts", "2", "-m", "--"]
    with started(["torch.distributed.run", *goes_on[1:]]) as launcher:
        lines = len((run / "metrics.jsonl").read_text().splitlines())
        wait_for_lines(run, lines + 2, launcher)
        launcher.send_signal(number)
        _, said = launcher.communicate(timeout=60)
    assert "saved" in said
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(rows)
    assert rows[-1] > int(saved[0])


@pytest.mark.slow
def test_the_command_names_a_rank_that_hangs(wait_for_lines, command, tmp_path):
    port, run = free_port(), tmp_path / "run"
    arguments = ["tinyexperts", *command(run, "--distributed.timeout-seconds", 5)]
    with (
        started(arguments, environment(0, 2, port)) as first,
        started(arguments, environment(1, 2, port)) as second,
    ):
        wait_for_lines(run, 3, first)
        os.kill(second.pid, signal.SIGSTOP)
        _, said = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "tinyexperts: rank 1 of 2 did not answer in time" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_mesh_is_named_by_all_others(make_config):
    config = make_config(model={"d_model": 128}, num_steps=6, distributed={"mesh": (2, 2), "timeout_seconds": 10.0})
    on_ranks(hang_at, 4, 4, free_port(), config, 2, 3)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_cut_short_on_one_rank_is_not_taken_for_good(make_config, tmp_path, asynchronous):
    options = {"model": {"d_model": 128}, "num_steps": 6, "checkpoint.every": 2, "checkpoint.keep": 5}
    options["checkpoint.asynchronous"] = asynchronous
    config = make_config(**options)
    with pytest.raises(mp.ProcessExitedException):
        mp.start_processes(die_while_writing, args=(2, free_port(), config, 4), nprocs=2, start_method="forkserver")
    assert [path.name for path in checkpoints(config.run)] == ["step-00000002"]
    assert [path.name for path in (config.run / "checkpoints").glob("*.partial")] == ["step-00000004.partial"]
    train_on_ranks([config], 2, resume=True)
    unhurt = make_config(**options, run=tmp_path / "unhurt")
    train_on_ranks([unhurt], 2)
    expected = load_model(unhurt.run).state_dict()
    for name, tensor in load_model(config.run).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("file_bytes", "asynchronous"), [(checkpoint_files.FILE_BYTES, False), (5_000, False), (5_000, True)]
)
def test_a_full_disk_on_one_rank_is_told_by_all(make_config, file_bytes, asynchronous):
    options = {"model": {"d_model": 128}, "num_steps": 4, "checkpoint.every": 2}
    options["checkpoint.asynchronous"] = asynchronous
    config = make_config(**options)
    train_on_ranks([config], 2)
    last = checkpoints(config.run)[-1]
    last.rename(last.with_name("step-00000004.partial"))  # as a kill would have left it
    before = load_model(config.run).state_dict()
    on_ranks(have_no_room, 2, 2, free_port(), config, file_bytes)
    assert [path.name for path in (config.run / "checkpoints").iterdir()] == ["step-00000002"]
    after = load_model(config.run).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_full_disk_for_metrics_is_told_by_all(make_config):
    config = make_config(model={"d_model": 128}, num_steps=4, log_every=1, checkpoint={"every": 100})
    on_ranks(have_no_room_for_metrics, 2, 2, free_port(), config, 2)
    train_on_ranks([config], 2, resume=True)
    rows = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]


def test_bad_input_is_told_by_every_rank(make_config, tmp_path):
    config = make_config(model={"d_model": 128})

    def refused(configs, message, resume=(False,)):
        on_ranks(be_refused, 2, 2, free_port(), configs, message, resume)

    changed = dataclasses.replace(config, seed=1)
    refused([config, changed], r"started with one configuration: that of rank \d .* is not that of rank \d")
    refused([make_config(batch_size=3, model={"d_model": 128})], "batch_size must be a multiple of the 2 ranks, got 3")
    message = r"all ranks must be started with --resume, or none; got it on 1 of 2 alone"
    refused([config], message, resume=(False, True))
    on_ranks(have_other_data, 2, 2, free_port(), config)
    narrow = make_config(distributed={"mesh": (1, 2)}, model={"d_model": 64})
    refused([narrow], "a table of 64 columns can't be shared by 2 ranks")
    assert not config.run.exists()
    wide = make_config(model={"d_model": 256})
    meshes = [with_settings(wide, {"distributed.mesh": mesh}) for mesh in ((2, 2), (1, 4))]
    on_ranks(be_refused, 4, 4, free_port(), meshes, "started with one configuration", (False,))
    train_on_ranks([config], 2)
    refused([config], "exists: add --resume to go on with it")
    next(checkpoints(config.run)[-1].glob("shard-00002*.safetensors")).unlink()
    refused([config], "lacks its file shard-00002", resume=(True,))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_started_again_go_on_with_their_own_run_only(make_config, num_ranks):
    others, port = make_config(model={"d_model": 128}, num_steps=4), free_port()
    own = dataclasses.replace(others, run=others.run.with_name("own"))
    of_launcher = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    assert of_launcher.port == port
    train_on_ranks([others], num_ranks)
    for restarts in ([0, 0], [1, 1]):
        message = "exists: add --resume to go on with it"
        on_ranks(be_refused, num_ranks, num_ranks, port, [others], message, (False,), restarts)
    for restarts in ([1, 1], [1, 2]):  # torchrun counts on each node by itself
        on_ranks(start_again, num_ranks, num_ranks, port, own, restarts)


def test_every_group_of_ranks_gives_up_after_the_time_out(make_config):
    config = make_config(model={"d_model": 128}, distributed={"mesh": (2, 2), "timeout_seconds": 7.0}, device="cpu")
    on_ranks(see_time_outs, 4, 4, free_port(), config)


def test_what_one_rank_cannot_write_all_are_told(make_config, tmp_path):
    tmp_path.joinpath("file").write_text("no folder")
    config = make_config(model={"d_model": 128}, run=tmp_path / "file" / "run")
    on_ranks(be_refused, 2, 2, free_port(), [config], "Not a directory.* on rank 0", (False,))


def test_a_mesh_and_a_backend_that_cannot_be_had_are_told(make_config, monkeypatch):
    with pytest.raises(InputError, match="mesh must multiply up to the number of ranks, 1, got 1 x 2"):
        train(make_config(distributed={"mesh": (1, 2)}), progress=False)
    with pytest.raises(InputError, match="mesh must be two numbers of at least 1, got 0 x 2"):
        make_config(distributed={"mesh": (0, 2)})
    with pytest.raises(InputError, match="timeout_seconds must be positive, got 0"):
        make_config(distributed={"timeout_seconds": 0.0})
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="backend nccl needs GPUs, and there is none"):
            train(make_config(distributed={"backend": "nccl"}), progress=False)
    with pytest.raises(InputError, match="backend nccl is for --device cuda, got cpu"):
        train(make_config(distributed={"backend": "nccl"}, device="cpu"), progress=False)
    monkeypatch.setenv("WORLD_SIZE", "6")
    for device in ("cuda:0", "mps", "xpu", "tpu"):
        with pytest.raises(InputError, match=rf"several ranks need --device auto, cpu or cuda .*, got {device}"):
            train(make_config(device=device), progress=False)
    with pytest.raises(InputError, match="backend gloo is for --device cpu, got cuda"):
        train(make_config(distributed={"backend": "gloo"}, device="cuda"), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        patch.setattr(dist, "is_nccl_available", lambda: True)
        with pytest.raises(InputError, match="backend gloo is for --device cpu, got auto on a machine with GPUs"):
            train(make_config(distributed={"backend": "gloo"}, device="auto"), progress=False)
        for local_rank in ("", "4"):
            patch.setenv("LOCAL_RANK", local_rank)
            for options in ({"device": "cuda"}, {"distributed.backend": "nccl", "device": "auto"}):
                with pytest.raises(InputError, match=f"needs a GPU of its own, .*: LOCAL_RANK is '{local_rank}', of 4"):
                    train(make_config(**options), progress=False)
    with pytest.raises(InputError, match="number of ranks, 6, got 2 x 2"):
        train(make_config(distributed={"mesh": (2, 2)}), progress=False)


def test_ranks_that_do_not_come_are_told(make_config, monkeypatch):
    config = make_config(distributed={"timeout_seconds": 1.0})
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"WORLD_SIZE is 2, but this is not how torchrun starts a rank: .*expected"):
        train(config, progress=False)
    for name, value in environment(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LostRank, match="not all 2 ranks came within 1 s"):
        train(config, progress=False)
    of_launcher = dist.TCPStore("localhost", free_port(), is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(of_launcher.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for rank, absent in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(LostRank, match=rf"not all 2 ranks came within 1 s \(rank {absent} did not come\)"):
            train(config, progress=False)
    assert not config.run.exists()
