"""A language model of 1.08 billion parameters on two CPU cores: one PEER block, N = 2^22 experts, D = 128.

Trains it, and the same model with N = 2^14, by the trainer of the package, and compares their tokens a second in
interleaved slices. Run: python benchmarks/billion_on_two_cores.py --data data/stdlib
(`tinyexperts data prepare` makes the data). About 9 GiB of memory and, for its checkpoint, 10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tinyexperts.layers import PEERConfig
from tinyexperts.training import recipes
from tinyexperts.training.checkpoint import load_checkpoint, save_checkpoint
from tinyexperts.training.config import OptimizerConfig, TrainConfig
from tinyexperts.training.run import make_run
from tinyexperts.training.step import optimizer_step

SIZES = (2**14, 2**22)


def config_of(num_experts: int, data: Path, run: Path, threads: int) -> TrainConfig:
    recipe = recipes.peer()
    layer = PEERConfig(num_experts=num_experts, num_heads=8, experts_per_head=16, query_dim=128)
    return replace(
        recipe,
        run=run,
        data=data,
        model=replace(recipe.model, d_model=128, num_layers=4, num_heads=4, expert_layer=layer),
        num_steps=10_000,
        training_flops=None,
        optimizer=OptimizerConfig(table_gradients="sparse", table_second_moment="row"),
        threads=threads,
    )


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set, vocabulary 4,096")
    parser.add_argument("--slices", type=int, default=12, help="slices of each model, interleaved")
    parser.add_argument("--steps", type=int, default=10, help="steps of a slice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/billion_on_two_cores.json"))
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        runs, result = {}, {"machine": platform.platform(), "threads": arguments.threads, "torch": torch.__version__}
        for num_experts in SIZES:
            before, started = resident_gib(), time.perf_counter()
            runs[num_experts] = make_run(
                config_of(num_experts, arguments.data, Path(folder, str(num_experts)), arguments.threads)
            )
            result[f"making_seconds_{num_experts}"] = time.perf_counter() - started
            result[f"num_parameters_{num_experts}"] = runs[num_experts].model.num_parameters().total
            result[f"model_gib_{num_experts}"] = resident_gib() - before
        steps = dict.fromkeys(SIZES, 0)
        tokens_per_second: dict[int, list[float]] = {num_experts: [] for num_experts in SIZES}
        losses: dict[int, list[float]] = {num_experts: [] for num_experts in SIZES}
        for number in track(range(arguments.slices + 1), description="training"):
            for num_experts, run in runs.items():
                started = time.perf_counter()
                for _ in range(arguments.steps):
                    losses[num_experts].append(optimizer_step(run, steps[num_experts])[0])
                    steps[num_experts] += 1
                seconds = time.perf_counter() - started
                if number:  # the first slice touches the memory of the optimizer's state
                    tokens_per_second[num_experts].append(arguments.steps * run.config.tokens_per_step / seconds)
        result["resident_gib_in_training"] = resident_gib()
        ratios = [large / small for small, large in zip(*tokens_per_second.values(), strict=True)]
        result |= {
            "tokens_per_second": {str(n): statistics.median(values) for n, values in tokens_per_second.items()},
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "first_and_last_loss": {str(n): [values[0], values[-1]] for n, values in losses.items()},
            "steps": steps[SIZES[1]],
        }
        large = runs[SIZES[1]]
        del runs
        peak_before, started = resident_gib(), time.perf_counter()
        checkpoint = save_checkpoint(large.config.run, 1, large.model, large.optimizers, {}, keep=1)
        result["saving_seconds"] = time.perf_counter() - started
        result["peak_gib_with_saving"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        result["resident_gib_before_saving"] = peak_before
        started = time.perf_counter()
        load_checkpoint(checkpoint, large.model)
        result["loading_seconds"] = time.perf_counter() - started
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("quantity", "value", title="1.08 billion parameters on two cores", title_justify="left")
    for name, value in result.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    console.print(table)


if __name__ == "__main__":
    main()
