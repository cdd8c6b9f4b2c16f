"""The benchmark over a grid of settings: what to measure, in which order, and where the results go."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tinyexperts.bench import memory, view
from tinyexperts.bench.measurement import measure_setting
from tinyexperts.bench.rivals import RIVALS, RivalName
from tinyexperts.bench.subjects import make_layer
from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically
from tinyexperts.training.config import path_of


@dataclass(frozen=True, kw_only=True)
class LayerBenchmarkConfig:
    """The grid of settings, and where the results go."""

    d_model: tuple[int, ...] = (256, 1024)
    """Widths D, even."""
    num_experts: tuple[int, ...] = (2**14, 2**18, 2**20, 2**22)
    """Numbers of experts N, squares."""
    num_tokens: tuple[int, ...] = (1, 64, 1024, 4096)
    """Tokens of a batch M; one token is measured in evaluation, more in training."""
    ids: tuple[Literal["uniform", "zipf"], ...] = ("uniform", "zipf")
    """Which experts the operator is given when it is measured alone; a layer's are those that its router chooses."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads."""
    rivals: tuple[RivalName, ...] = tuple(RIVALS)
    """What to measure beside the layer; `--rivals` alone: nothing."""
    repeats: int = 7
    """Rounds that a median is taken over."""
    output: Path = Path("runs/bench")
    """Folder of layer.json and layer.svg."""
    max_memory_gib: float = 8.0
    """Of tables, gradients and optimisers' state at a time; settings and rivals that need more are left out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", path_of("output", self.output))
        for name in ("d_model", "num_experts", "num_tokens", "threads"):
            values = getattr(self, name)
            option = "--" + name.replace("_", "-")
            if not values or min(values) < 1:
                raise InputError(f"{option} must be one or more numbers of at least 1, got {values}")
        if not self.ids:
            raise InputError("--ids must be uniform, zipf or both, got none")
        for d_model in self.d_model:
            if d_model % 2:
                raise InputError(f"--d-model must be even (the limit reads words of 8 bytes), got {d_model}")
        for num_experts in self.num_experts:
            if math.isqrt(num_experts) ** 2 != num_experts:
                raise InputError(f"--num-experts must be squares (product keys are pairs), got {num_experts}")
        if self.repeats < 1:
            raise InputError(f"--repeats must be at least 1, got {self.repeats}")
        if not self.max_memory_gib > 0:
            raise InputError(f"--max-memory-gib must be positive, got {self.max_memory_gib}")


def run_layer_benchmark(config: LayerBenchmarkConfig) -> dict[str, Any]:
    """Measure every setting that fits into the memory, print tables, write layer.json and layer.svg; returns the JSON.

    layer.json is written after each setting, so that an interruption keeps what is measured.

    Raises:
        InputError: a kernel differs from the reference, or no setting fits.
    """
    max_bytes = config.max_memory_gib * memory.GIB
    sizes, skipped = [], []
    for d_model, num_experts in product(config.d_model, config.num_experts):
        needed = memory.needed_bytes("row", memory.table_bytes(d_model, num_experts))
        if needed <= max_bytes:
            sizes.append((d_model, num_experts))
        else:
            skipped.append(
                f"{_name(d_model, num_experts)}: the table with its optimiser's state needs at least "
                f"{memory.gib(needed)}, --max-memory-gib is {config.max_memory_gib:g}"
            )
    if not sizes:
        raise InputError(f"nothing is measured: {skipped[0]}")
    config.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "configuration": {**asdict(config), "output": str(config.output)},
        "results": [],
        "skipped": skipped,
    }
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("", total=len(sizes) * len(config.threads) * len(config.num_tokens))
        for d_model, num_experts in sizes:
            progress.update(task, description=f"{_name(d_model, num_experts)}: making the table")
            layer = make_layer(d_model, num_experts)
            for threads, num_tokens in product(config.threads, config.num_tokens):
                setting = f"{_name(d_model, num_experts)}, M = {num_tokens}, threads: {threads}"
                result = measure_setting(
                    layer,
                    num_tokens=num_tokens,
                    threads=threads,
                    ids=config.ids,
                    repeats=config.repeats,
                    max_bytes=max_bytes,
                    rivals=config.rivals,
                    on_stage=lambda stage, setting=setting: progress.update(task, description=f"{setting}: {stage}"),
                )
                report["results"].append(result)
                write_atomically(config.output / "layer.json", json.dumps(report, indent=1) + "\n")
                progress.advance(task)
            del layer  # before the next one is made
    write_atomically(config.output / "layer.svg", str(view.figure(report["results"])))
    _print(report)
    print(f"{config.output / 'layer.json'}, {config.output / 'layer.svg'}")
    return report


def _print(report: dict[str, Any]) -> None:
    tables = view.tables(report["results"])
    console = Console()
    widest = max(console.measure(table, options=console.options.update(max_width=1000)).maximum for table in tables)
    if widest > console.width:  # lines that the terminal breaks lose less than cells cut short
        console = Console(width=widest)
    for table in tables:
        console.print(table)
    for sentence in [*report["skipped"], *_left_out(report["results"])]:
        console.print(f"left out: {sentence}", markup=False, highlight=False, soft_wrap=True)


def _left_out(results: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{_name(result['d_model'], result['num_experts'])}, M = {result['num_tokens']}, threads: {result['threads']}: "
        f"{reason}"
        for result in results
        for reason in result["left_out"]
    ]


def _name(d_model: int, num_experts: int) -> str:
    return f"D = {d_model}, N = {num_experts:,}"


def describe_machine() -> dict[str, Any]:
    """The processor, its cores, the versions, and whether memory comes in huge pages: what the numbers depend on."""
    versions: dict[str, str | None] = {}
    for package in ("tinyexperts", "torch", "numpy", "numba", "PEER-pytorch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "huge_pages": _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE"),
    }


def _processor() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
