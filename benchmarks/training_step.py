"""Steps of the trainer for dense and PEER, compiled or not, and the seconds of a generated token, on one CPU core.

All in turns in one process, at the sizes of the study of facts. Run:
python benchmarks/training_step.py --data runs/demo/data
(`make demo` makes the data; any data set of 1,024 tokens will do).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tinyexperts.bench.run import describe_machine
from tinyexperts.bench.timing import Spread, interleaved, timed
from tinyexperts.model import generate
from tinyexperts.training import recipes
from tinyexperts.training.config import TrainConfig, with_settings
from tinyexperts.training.run import make_run
from tinyexperts.training.step import optimizer_step

NEW_TOKENS = 64


def config_of(method: str, width: int, data: Path, compiled: str) -> TrainConfig:
    settings = {
        "data": data,
        "model.d_model": width,
        "model.num_heads": width // 16,
        "model.vocab_size": 1024,
        "model.context_length": 128,
        "batch_size": 8,
        "training_flops": None,
        "num_steps": 10_000,
        "compile": compiled,
        "threads": 1,
    }
    return with_settings(recipes.RECIPES[method](), settings)


def calls_of(config: TrainConfig) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a training step, and the generation of some tokens by a model of the same sizes."""
    run, steps = make_run(config), count()
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    return (
        lambda: optimizer_step(run, next(steps)),
        lambda: generate(run.model, tokens, max_new_tokens=NEW_TOKENS, temperature=0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set, vocabulary 1,024")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=30, help="rounds that a median is taken over")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training_step.json"))
    arguments = parser.parse_args()
    results = []
    for width in arguments.widths:
        steps, tokens = {}, {}
        for method in ("dense", "peer"):
            for compiled in ("off", "on"):
                step, generation = calls_of(config_of(method, width, arguments.data, compiled))
                steps[method, compiled] = timed(step)
                if compiled == "off":
                    tokens[method] = timed(generation)
        seconds = {key: times[:, 0] for key, times in interleaved(steps, arguments.repeats).items()}
        of_token = {key: times[:, 0] / NEW_TOKENS for key, times in interleaved(tokens, arguments.repeats).items()}
        dense = {compiled: seconds["dense", compiled] for compiled in ("off", "on")}
        for (method, compiled), times in seconds.items():
            results.append(
                {
                    "width": width,
                    "method": method,
                    "compiled": compiled,
                    "step_seconds": asdict(Spread.of(times)),
                    "tokens_per_second": 1024 / float(np.median(times)),
                    "speed_of_not_compiled": asdict(Spread.of(seconds[method, "off"] / times)),
                    "speed_of_dense": asdict(Spread.of(dense[compiled] / times)),
                    "seconds_a_generated_token": asdict(Spread.of(of_token[method])) if compiled == "off" else None,
                }
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": describe_machine(), "results": results}, indent=2) + "\n")
    table = Table(title="A step of 1,024 tokens on one core: median (quartiles)", title_justify="left")
    for heading in (
        *("width", "method", "compiled", "step, ms", "tokens/s"),
        "x not compiled",
        "x dense",
        "ms a new token",
    ):
        table.add_column(heading, justify="right")
    for found in results:
        table.add_row(
            *(str(found[name]) for name in ("width", "method", "compiled")),
            _spread(found["step_seconds"], 1e3),
            f"{found['tokens_per_second']:,.0f}",
            *(_spread(found[name], 1) for name in ("speed_of_not_compiled", "speed_of_dense")),
            _spread(found["seconds_a_generated_token"], 1e3),
        )
    Console().print(table)


def _spread(found: dict[str, float] | None, factor: float) -> str:
    if found is None:
        return ""
    median, low, high = (factor * found[name] for name in ("median", "lower_quartile", "upper_quartile"))
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


if __name__ == "__main__":
    main()
