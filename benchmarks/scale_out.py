"""Weak scaling on one machine: 1 and 2 ranks with as many tokens each, and the bytes that they send, counted.

The exchanges of one step are counted where torch makes them, also for two replicas and for two groups of two ranks, and
must equal what `tinyexperts plan` says, or nothing is reported; then steps of one rank and of two that share the table
take turns. Run: python benchmarks/scale_out.py --data data/stdlib
"""

from __future__ import annotations

import argparse
import json
import math
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
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from tinyexperts.layers import PEERConfig
from tinyexperts.planning import Devices, plan
from tinyexperts.training import recipes
from tinyexperts.training.config import DistributedConfig, TrainConfig
from tinyexperts.training.distributed.launch import init_distributed
from tinyexperts.training.run import make_run
from tinyexperts.training.step import optimizer_step

Mesh = tuple[int, int]  # (replicate, table)
ALONE: Mesh = (1, 1)
SHARED: Mesh = (1, 2)
COUNTED: list[Mesh] = [SHARED, (2, 1), (2, 2)]
# The share of its input that a rank sends in an exchange, by the number of ranks.
SENT: dict[str, Callable[[int], float]] = {
    "c10d::_allgather_base_": lambda ranks: ranks - 1,
    "c10d::_reduce_scatter_base_": lambda ranks: (ranks - 1) / ranks,
    "c10d::alltoall_base_": lambda ranks: (ranks - 1) / ranks,
    "c10d::allreduce_": lambda ranks: 2 * (ranks - 1) / ranks,
    "c10d::allgather_": lambda ranks: ranks - 1,
}


class SentBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that this rank sends, by exchange."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
            num_ranks = dist.ProcessGroup.unbox(by_name["process_group"]).size()
            self.by_exchange[name.removeprefix("c10d::")] += round(count * SENT[name](num_ranks))
        return func(*args, **(kwargs or {}))


def config_of(arguments: argparse.Namespace, mesh: Mesh) -> TrainConfig:
    recipe = recipes.peer()
    layer = PEERConfig(num_experts=arguments.num_experts, num_heads=8, experts_per_head=16, query_dim=128)
    return replace(
        recipe,
        run=Path(tempfile.gettempdir()) / "never written",
        data=arguments.data,
        model=replace(recipe.model, d_model=arguments.d_model, num_layers=4, num_heads=4, expert_layer=layer),
        num_steps=10_000,
        training_flops=None,
        distributed=DistributedConfig(mesh=mesh),
        batch_size=arguments.sequences * math.prod(mesh),
        device="cpu",
        threads=1,
    )


def work(rank: int, mesh: Mesh, port: int, arguments: argparse.Namespace, pipe: Any) -> None:
    """Count one step as a rank, then make a slice of steps whenever it is asked for."""
    num_ranks = str(math.prod(mesh))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    config = config_of(arguments, mesh)
    with init_distributed(config) as ranks:
        run = make_run(config, ranks)
        optimizer_step(run, 0)
        with SentBytes() as sent:
            optimizer_step(run, 1)
        pipe.send(dict(sent.by_exchange))
        step = 2
        while pipe.recv():
            started = time.perf_counter()
            for _ in range(arguments.steps):
                optimizer_step(run, step)
                step += 1
            pipe.send(arguments.steps * config.tokens_per_step / (time.perf_counter() - started))


class Started:
    """The ranks of a mesh, when each has counted a step."""

    def __init__(self, mesh: Mesh, arguments: argparse.Namespace) -> None:
        context, port = mp.get_context("spawn"), free_port()
        self._pipes, self._processes = [], []
        for rank in range(math.prod(mesh)):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, mesh, port, arguments, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self.sent: list[dict[str, int]] = [pipe.recv() for pipe in self._pipes]

    def tokens_per_second(self) -> float:
        """Return the tokens per second of one slice of steps on the slowest rank."""
        for pipe in self._pipes:
            pipe.send(True)
        return min(float(pipe.recv()) for pipe in self._pipes)

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        for process in self._processes:
            process.join()


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
    expected, sent = {}, {}
    for mesh in track(COUNTED, description="counting"):
        started = Started(mesh, arguments)
        started.end()
        name = "{} x {}".format(*mesh)
        expected[name], sent[name] = check(arguments, mesh, started.sent), started.sent[0]
    timed = [Started(mesh, arguments) for mesh in (ALONE, SHARED)]
    if any(timed[0].sent[0].values()):
        raise SystemExit(f"one rank sent something: {timed[0].sent[0]}")
    slices = [
        [each.tokens_per_second() for each in timed] for _ in track(range(arguments.slices), description="training")
    ]
    for each in timed:
        each.end()
    quartiles = statistics.quantiles([two / one for one, two in slices], n=4)
    medians = [statistics.median(speeds) for speeds in zip(*slices, strict=True)]
    result = {
        "machine": platform.platform(),
        "torch": torch.__version__,
        "configuration": {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)},
        "sent_bytes_of_rank_0": sent,
        "planned_bytes": expected,
        "tokens_per_second": dict(zip(("1", "2"), medians, strict=True)),
        "ratio_of_tokens_per_second": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("quantity", "value", title="1 and 2 ranks, as many tokens each", title_justify="left")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)


def check(arguments: argparse.Namespace, mesh: Mesh, sent: list[dict[str, int]]) -> dict[str, float]:
    """Check that ranks send the bytes of the plan in gathers, scatters and all-to-alls; return the plan's bytes."""
    count, any_speed = len(sent), 1e9
    devices = Devices(
        count=count, per_node=count, memory_bytes=1e9, flops=any_speed, memory_speed=any_speed, link_speed=any_speed,
        node_link_speed=any_speed,
    )  # fmt: skip
    plans = plan(config_of(arguments, mesh), devices)
    exchanges = next(each.exchanges for each in plans if (each.replicate, each.table) == mesh)
    for rank, counted in enumerate(sent):
        # Sums for batch norm and the gradient's norm, and numbers that ranks send each other, are not in the plan.
        planned = sum(count for name, count in counted.items() if name not in ("allreduce_", "allgather_"))
        if planned != round(exchanges.total):
            raise SystemExit(f"mesh {mesh}: rank {rank} sent {planned:,} bytes, the plan says {exchanges}: {counted}")
    return vars(exchanges) | {"total": exchanges.total}


if __name__ == "__main__":
    main()
