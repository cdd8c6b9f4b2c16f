"""tinyexperts beside PEER-pytorch 0.2.2, product-key-memory 0.3.0 and a dense layer, on one CPU thread.

Four parts: how many of the true top-k each retrieves; the times of a forward pass and of a training step; the memory of
a step; and the loss on facts after equal training FLOPs. Each part writes a file, and tables.md shows all that are in
the folder. Facts take some 45 minutes of one core; their runs are kept, and those that are missing are trained. Run:

python benchmarks/peer_packages.py --output runs/peer-packages
(pip install PEER-pytorch==0.2.2 product-key-memory==0.3.0)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peer_package_parts import exactness, facts, speed, step_memory, tables

from tinyexperts.bench.run import describe_machine
from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the comparison."""

    title: str
    config: Any
    quick: Any
    """The sizes of a check in seconds."""
    measure: Callable[[Any, Path, Callable[[str], None]], Any]
    table: Callable[[Any], str]


PARTS: Mapping[str, Part] = {
    "exactness": Part(
        title="Share of the true top-k that is retrieved (random queries / ties / clusters where they differ)",
        config=exactness.ExactnessConfig(),
        quick=exactness.ExactnessConfig(num_experts=(64, 256), experts_per_head=(4,), num_tokens=8, query_dim=8),
        measure=lambda config, output, show: exactness.measure(config, show),
        table=tables.exactness_table,
    ),
    "speed": Part(
        title="Time over ours of the same weights: median (quartiles); milliseconds, theirs / ours",
        config=speed.SpeedConfig(),
        quick=speed.SpeedConfig(
            d_model=16, num_experts=(64,), num_tokens=(1, 8), num_heads=2, experts_per_head=4, query_dim=8, repeats=1
        ),
        measure=lambda config, output, show: speed.measure(config, show),
        table=tables.speed_tables,
    ),
    "memory": Part(
        title="Memory of training",
        config=step_memory.MemoryConfig(),
        quick=step_memory.MemoryConfig(
            d_model=16, num_experts=256, num_tokens=8, num_heads=2, experts_per_head=4, query_dim=8
        ),
        measure=lambda config, output, show: step_memory.measure(config, show),
        table=tables.memory_table,
    ),
    "facts": Part(
        title="Known facts after equal training FLOPs",
        config=facts.FactsConfig(),
        quick=facts.FactsConfig(
            training_flops=4e8,
            num_airports=20,
            vocab_size=300,
            context_length=64,
            batch_size=2,
            width=16,
            num_experts=32**2,
            num_heads=1,
            query_dim=8,
            seeds=(0, 1),
        ),
        measure=facts.measure,
        table=tables.facts_table,
    ),
}


def measure_part(name: str, output: Path, *, quick: bool, show: Callable[[str], None]) -> None:
    """Measure a part, and write its file."""
    part = PARTS[name]
    config = part.quick if quick else part.config
    results = part.measure(config, output, show)
    versions = {package: metadata.version(package) for package in ("PEER-pytorch", "product-key-memory")}
    content = {"machine": describe_machine() | {"peers": versions}, "config": asdict(config), "results": results}
    write_atomically(output / f"{name}.json", json.dumps(content, indent=1) + "\n")


def tables_of(output: Path) -> str:
    """Return the tables of the parts whose files are there."""
    found = {name: output / f"{name}.json" for name in PARTS}
    return "\n".join(
        f"## {PARTS[name].title}\n\n{PARTS[name].table(json.loads(path.read_text())['results'])}"
        for name, path in found.items()
        if path.exists()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/peer-packages"), help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which show that all works, in seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        for name in arguments.parts:
            measure_part(name, arguments.output, quick=arguments.quick, show=lambda at: print(at, file=sys.stderr))
    except InputError as error:
        parser.error(str(error))
    text = tables_of(arguments.output)
    write_atomically(arguments.output / "tables.md", text)
    print(text)


if __name__ == "__main__":
    main()
