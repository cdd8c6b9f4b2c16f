"""Runs functions in several processes, as torchrun starts them: in a gloo group, or as training forms its own.

The processes are kept for the next test, since to start one takes longer than most tests.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forkserver import CONTEXT

from tinyexperts.training import TrainConfig, train

TIMEOUT_SECONDS = 120

_kept: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []


def on_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Call function(rank, *arguments), a module's own, in `num_ranks` processes; what fails in one fails here."""
    started = [_start() for _ in range(num_ranks - len(_kept))]
    for rank, (_, pipe) in enumerate(started, start=len(_kept)):
        assert _answer(rank, pipe) is None  # all are there: how long ranks wait for each other is measured from here
    _kept.extend(started)
    called = list(enumerate(_kept[:num_ranks]))
    for rank, (_, pipe) in called:
        pipe.send((function, rank, arguments))
    failures = [failure for rank, (_, pipe) in called if (failure := _answer(rank, pipe))]
    if failures:
        dismiss()  # the others may wait for what failed
        raise AssertionError("\n".join(failures))


def _start() -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _answer(rank: int, pipe: Connection) -> str | None:
    try:
        if pipe.poll(2 * TIMEOUT_SECONDS):
            failure: str | None = pipe.recv()
            return failure and f"rank {rank}: {failure}"
    except EOFError:
        return f"rank {rank} died"
    return f"rank {rank} hangs"


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(None)
    while True:
        try:
            function, rank, arguments = pipe.recv()
        except EOFError:
            return
        try:
            function(rank, *arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


@atexit.register
def dismiss() -> None:
    """End the processes that are kept."""
    for process, pipe in _kept:
        pipe.close()
        process.kill()
    _kept.clear()


def run_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """As `on_ranks`, in a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(_in_group, num_ranks, num_ranks, Path(folder, "rendezvous"), function, arguments)


def _in_group(
    rank: int, num_ranks: int, rendezvous: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        function(rank, *arguments)
        dist.barrier()  # one that ends at once would be gone while another still connects to it
    finally:
        dist.destroy_process_group()


def train_on_ranks(runs: Sequence[TrainConfig], num_ranks: int, *, resume: bool = False) -> None:
    """Train one configuration after the other on so many ranks."""
    for config in runs:
        on_ranks(_train, num_ranks, num_ranks, free_port(), config, resume)


def _train(rank: int, num_ranks: int, port: int, config: TrainConfig, resume: bool) -> None:
    os.environ |= environment(rank, num_ranks, port)
    train(config, resume=resume, progress=False)


def environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
