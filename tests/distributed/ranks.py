"""Runs functions in several processes, as torchrun starts them: in a gloo group, or as training forms its own."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tinyexperts.training import TrainConfig, train

TIMEOUT = timedelta(seconds=120)


def run_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Call function(rank, *arguments), a module's own, in `num_ranks` processes; what fails in one fails here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _run,
            args=(function, num_ranks, Path(folder, "rendezvous"), arguments),
            nprocs=num_ranks,
            start_method="spawn",
        )


def _run(
    rank: int, function: Callable[..., None], num_ranks: int, rendezvous: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def train_on_ranks(runs: Sequence[TrainConfig], num_ranks: int, *, resume: bool = False) -> None:
    """Train one configuration after the other on so many ranks."""
    mp.start_processes(_train, args=(num_ranks, [(config, free_port()) for config in runs], resume), nprocs=num_ranks)


def _train(rank: int, num_ranks: int, runs: list[tuple[TrainConfig, int]], resume: bool) -> None:
    for config, port in runs:
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
