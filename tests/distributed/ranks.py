"""Runs a function in several processes that form a gloo group, as torchrun starts them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
