"""What the ranks of test_faults.py do: train, and fail at it."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tinyexperts.data.shards import reader
from tinyexperts.errors import InputError
from tinyexperts.training import LostRank, TrainConfig, checkpoint_files, loop, train
from tinyexperts.training.checkpoint import CheckpointWriter
from tinyexperts.training.distributed.launch import init_distributed
from tinyexperts.training.run import make_run


def be_refused(
    rank: int,
    num_ranks: int,
    port: int,
    configs: list[TrainConfig],
    message: str,
    resume: tuple[bool, ...],
    restarts: list[int] | None = None,
) -> None:
    """Every rank gets the sentence; configurations and resumption are dealt out in turns."""
    os.environ |= environment(rank, num_ranks, port)
    with started_by_torchrun(restarts and restarts[rank]), pytest.raises((InputError, OSError), match=message):
        train(configs[rank % len(configs)], resume=resume[rank % len(resume)], progress=False)


def have_other_data(rank: int, num_ranks: int, port: int, config: TrainConfig) -> None:
    """At the same place, as on a disk of the node's own."""
    os.environ |= environment(rank, num_ranks, port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "sha256_of_splits", lambda _: f"of rank {rank}")
        with pytest.raises(InputError, match=r"must have the same data in .*, got sha256 of rank 0, of rank 1"):
            train(config, progress=False)


def start_again(rank: int, num_ranks: int, port: int, config: TrainConfig, restarts: list[int]) -> None:
    """As torchrun does when a rank has died: by the same command."""
    os.environ |= environment(rank, num_ranks, port)
    with started_by_torchrun(restarts[rank]):
        train(config, progress=False)


@contextmanager
def started_by_torchrun(restart: int | None) -> Iterator[None]:
    """Its store outlives the attempts, and it counts restarts node by node."""
    with pytest.MonkeyPatch.context() as patch:
        if restart is not None:
            patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
            patch.setenv("TORCHELASTIC_RUN_ID", "none")
            patch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        yield


def train_under_an_agent(config: TrainConfig, victim: int, kill_at: int) -> None:
    """As torchrun does, whose agent this is: two ranks, started again once."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        start_method="forkserver",
    )
    elastic_launch(launch, _train_and_be_killed_once)(config, victim, kill_at)


def _train_and_be_killed_once(config: TrainConfig, victim: int, kill_at: int) -> None:
    """The victim is killed when the run has this many lines of metrics, whatever it is doing then."""
    torch.set_num_threads(1)
    is_first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if not is_first_attempt:
        config.run.with_name("started again").touch()
    if is_first_attempt and int(os.environ["RANK"]) == victim:
        threading.Thread(target=_die_at_line, args=(config.run / "metrics.jsonl", kill_at), daemon=True).start()
    train(config, progress=False)


def _die_at_line(path: Path, number: int) -> None:
    while not path.exists() or len(path.read_text().splitlines()) < number:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


def see_time_outs(rank: int, num_ranks: int, port: int, config: TrainConfig) -> None:
    """Of all groups, of FSDP2's, and of that which writes checkpoints beside the training."""
    os.environ |= environment(rank, num_ranks, port)
    with pytest.MonkeyPatch.context() as patch, init_distributed(config) as ranks:
        patch.setattr(torch.cuda, "is_available", lambda: True)  # where init_device_mesh would make groups of its own
        model = make_run(config, ranks).model
        of_fsdp = {
            module._get_fsdp_state()._fsdp_param_group.mesh_info.mesh.get_group() for module in fsdp_modules(model)
        }
        assert of_fsdp == {ranks.groups.all_ranks}
        writer = CheckpointWriter(config.run, keep=1, ranks=ranks, asynchronous=True)
        groups = [
            ranks.groups.all_ranks,
            ranks.groups.column_ranks,
            ranks.groups.replica_ranks,
            writer._ranks.groups.all_ranks,
        ]
        assert [group.size() for group in groups] == [4, 2, 2, 4]
        time_outs = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert time_outs == [timedelta(seconds=config.distributed.timeout_seconds)] * 4


def fsdp_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def die_while_writing(rank: int, num_ranks: int, port: int, config: TrainConfig, step: int) -> None:
    """The last rank is gone when it has written its part of the checkpoint of a step, but not said so."""
    os.environ |= environment(rank, num_ranks, port)
    write = checkpoint_files._write_small

    def write_and_die(tensors: Any, folder: Path, ranks: Any) -> None:
        write(tensors, folder, ranks)
        if rank == num_ranks - 1 and folder.name.startswith(f"step-{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_files._write_small = write_and_die
    train(config, progress=False)


def have_no_room(rank: int, num_ranks: int, port: int, config: TrainConfig, file_bytes: int) -> None:
    """A file-size limit on the last rank is the nearest thing to a full disk that a test can have without being root.

    With a small `file_bytes` it is a table's part that does not fit.
    """
    os.environ |= environment(rank, num_ranks, port)
    told = rf"step 4 could not be written \(File too large on rank {num_ranks - 1}\); the last good .*step-00000002"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files, "FILE_BYTES", file_bytes)
        with no_file_above(4_000 if rank == num_ranks - 1 else None), pytest.raises(InputError, match=told):
            train(config, resume=True, progress=False)


@contextmanager
def no_file_above(num_bytes: int | None) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if num_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def have_no_room_for_metrics(rank: int, num_ranks: int, port: int, config: TrainConfig, step: int) -> None:
    """From a step on the first rank can't write a line; all are told."""
    os.environ |= environment(rank, num_ranks, port)

    def limit() -> None:
        stack.enter_context(no_file_above((config.run / "metrics.jsonl").stat().st_size + 50))

    with (
        ExitStack() as stack,
        before_step(step, limit if rank == 0 else None),
        pytest.raises(InputError, match="File too large on rank 0"),
    ):
        train(config, progress=False)


def hang_at(rank: int, num_ranks: int, port: int, config: TrainConfig, victim: int, step: int) -> None:
    """One rank goes to sleep before a step, until all others have named it."""
    os.environ |= environment(rank, num_ranks, port)

    def sleep() -> None:
        until = time.monotonic() + 120
        while len(list(config.run.glob("named-by-*"))) < num_ranks - 1 and time.monotonic() < until:
            time.sleep(0.1)

    told = ".*" if rank == victim else f"rank {victim} of {num_ranks} did not answer"
    with before_step(step, sleep if rank == victim else None), pytest.raises(LostRank, match=told):
        train(config, progress=False)
    config.run.joinpath(f"named-by-{rank}").touch()


@contextmanager
def before_step(step: int, act: Callable[[], None] | None) -> Iterator[None]:
    """Meanwhile training does something else before it makes a step."""
    make_step = loop.optimizer_step

    def act_and_make_step(run: Any, at: int) -> tuple[float, float]:
        if at == step and act is not None:
            act()
        return make_step(run, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", act_and_make_step)
        yield
