"""Weak scaling on one machine: 1 and 2 ranks with as many tokens each, and the bytes that they send, counted.

The exchanges of one step are counted where torch makes them and must equal what `tinyexperts plan` says, or nothing is
reported; then steps of one rank and of two take turns. Run: python benchmarks/scale_out.py --data data/stdlib
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from tinyexperts.model import PEERConfig
from tinyexperts.training import Devices, loop, plan, recipes
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.ranks import joined

RANKS = (1, 2)
# Of what a rank gives to an exchange: how much it sends, by the number of ranks.
SENT: dict[str, Callable[[int], float]] = {
    "c10d::_allgather_base_": lambda ranks: ranks - 1,
    "c10d::_reduce_scatter_base_": lambda ranks: (ranks - 1) / ranks,
    "c10d::alltoall_base_": lambda ranks: (ranks - 1) / ranks,
    "c10d::allreduce_": lambda ranks: 2 * (ranks - 1) / ranks,
    "c10d::allgather_": lambda ranks: ranks - 1,
}


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends, by exchange; all groups are of all ranks."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.num_ranks = num_ranks
        self.by_exchange: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            if name not in SENT:
                raise SystemExit(f"{name} is not counted")
            by_name = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            given = next(
                by_name[key] for key in ("input_tensor", "input", "input_tensors", "tensors") if key in by_name
            )
            tensors = given if isinstance(given, list) else [given]
            count = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.by_exchange[name.removeprefix("c10d::")] += round(count * SENT[name](self.num_ranks))
        return func(*args, **(kwargs or {}))


def config_of(arguments: argparse.Namespace, num_ranks: int, folder: Path) -> TrainConfig:
    recipe = recipes.peer()
    layer = PEERConfig(num_experts=arguments.num_experts, num_heads=8, experts_per_head=16, query_dim=128)
    return replace(
        recipe,
        run=folder / str(num_ranks),
        data=arguments.data,
        model=replace(recipe.model, d_model=arguments.d_model, num_layers=4, num_heads=4, sparse_layer=layer),
        num_steps=10_000,
        training_flops=None,
        batch_size=arguments.sequences * num_ranks,
        device="cpu",
        threads=1,
    )


def work(rank: int, num_ranks: int, port: int, arguments: argparse.Namespace, pipe: Any) -> None:
    """A rank: counts one step, then makes a slice of steps whenever it is asked to."""
    if num_ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    config = config_of(arguments, num_ranks, Path(tempfile.gettempdir()))
    with joined(config) as ranks:
        run = loop._prepare(config, ranks)
        loop._step(run, 0)
        with SentBytes(num_ranks) as sent:
            loop._step(run, 1)
        pipe.send(dict(sent.by_exchange))
        step = 2
        while pipe.recv():
            started = time.perf_counter()
            for _ in range(arguments.steps):
                loop._step(run, step)
                step += 1
            pipe.send(arguments.steps * config.tokens_per_step / (time.perf_counter() - started))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set, vocabulary 4,096")
    parser.add_argument("--num-experts", type=int, default=2**18)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4, help="of 256 tokens, a rank")
    parser.add_argument("--slices", type=int, default=9, help="slices of each number of ranks, in turns")
    parser.add_argument("--steps", type=int, default=4, help="steps of a slice")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scale_out.json"))
    arguments = parser.parse_args()
    context = mp.get_context("spawn")
    pipes, processes = {}, []
    for num_ranks in RANKS:
        port = free_port()
        pipes[num_ranks] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, num_ranks, port, arguments, theirs), daemon=True)
            process.start()
            processes.append(process)
            pipes[num_ranks].append(ours)
    sent = {num_ranks: [pipe.recv() for pipe in of_ranks] for num_ranks, of_ranks in pipes.items()}
    expected = check(arguments, sent)
    speeds: dict[int, list[float]] = {num_ranks: [] for num_ranks in RANKS}
    for _ in track(range(arguments.slices), description="training"):
        for num_ranks, of_ranks in pipes.items():
            for pipe in of_ranks:
                pipe.send(True)
            speeds[num_ranks].append(min(pipe.recv() for pipe in of_ranks))
    for of_ranks in pipes.values():
        for pipe in of_ranks:
            pipe.send(False)
    for process in processes:
        process.join()
    ratios = [two / one for one, two in zip(*speeds.values(), strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "machine": platform.platform(),
        "torch": torch.__version__,
        "configuration": {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)},
        "sent_bytes_of_rank_0": sent[2][0],
        "planned_bytes": expected,
        "tokens_per_second": {str(ranks): statistics.median(values) for ranks, values in speeds.items()},
        "ratio_of_tokens_per_second": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("quantity", "value", title="1 and 2 ranks, as many tokens each", title_justify="left")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)


def check(arguments: argparse.Namespace, sent: dict[int, list[dict[str, int]]]) -> dict[str, float]:
    """The bytes that two ranks send in gathers, scatters and all-to-alls are those of the plan, to the byte."""
    devices = Devices(count=2, memory_bytes=1e9, flops=1e9, memory_speed=1e9, link_speed=1e9)
    mesh = plan(config_of(arguments, 2, Path(tempfile.gettempdir())), devices)[0]
    assert (mesh.replicate, mesh.table) == (1, 2)
    if any(sent[1][0].values()):
        raise SystemExit(f"one rank sent something: {sent[1][0]}")
    for rank, counted in enumerate(sent[2]):
        # Sums for batch norm and the gradient's norm, and numbers that ranks tell each other, are not in the plan.
        planned = sum(count for name, count in counted.items() if name not in ("allreduce_", "allgather_"))
        if planned != round(mesh.exchanges.total):
            raise SystemExit(f"rank {rank} sent {planned:,} bytes, the plan says {mesh.exchanges}: {counted}")
    return vars(mesh.exchanges) | {"total": mesh.exchanges.total}


if __name__ == "__main__":
    main()
