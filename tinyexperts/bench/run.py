"""The benchmark over a grid of settings: what to measure, in which order, and the files of results."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tinyexperts.bench import memory, view
from tinyexperts.bench.baselines import BASELINES, BaselineName
from tinyexperts.bench.contestants import make_layer
from tinyexperts.bench.measurement import Measurement, measure_setting, to_json
from tinyexperts.errors import InputError, require_at_least
from tinyexperts.files import write_atomically
from tinyexperts.ops.kernels_on import kernels_on
from tinyexperts.training.config import path_of


@dataclass(frozen=True, kw_only=True)
class LayerBenchmarkConfig:
    """The grid of settings, and the folder of the results."""

    d_model: tuple[int, ...] = (256, 1024)
    """Widths D, even."""
    num_experts: tuple[int, ...] = (2**14, 2**18, 2**20, 2**22)
    """Numbers of experts N, squares."""
    num_tokens: tuple[int, ...] = (1, 64, 1024, 4096)
    """Tokens of a batch M; one token is measured in evaluation, more in training."""
    ids: tuple[Literal["uniform", "zipf"], ...] = ("uniform", "zipf")
    """Kinds of experts for the operator when it is measured alone; a layer's are those that its router chooses."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads."""
    baselines: tuple[BaselineName, ...] = tuple(BASELINES)
    """Layers to compare with; `--baselines` alone: none."""
    repeats: int = 7
    """Rounds that a median is taken over."""
    output: Path = Path("runs/bench")
    """Folder of layer.json and layer.svg."""
    max_memory_gib: float = 8.0
    """Memory of tables, gradients and optimizers' state at a time; what needs more is left out."""

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
        require_at_least(1, "--repeats", self.repeats)
        if not self.max_memory_gib > 0:
            raise InputError(f"--max-memory-gib must be positive, got {self.max_memory_gib}")


def run_layer_benchmark(config: LayerBenchmarkConfig) -> list[Measurement]:
    """Measure every setting that fits into the memory, print tables, write layer.json and layer.svg.

    layer.json is written after each setting, so that an interruption keeps what is measured.

    Args:
        config (LayerBenchmarkConfig): the settings.

    Returns:
        The measurements in the order in which they were made.

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
                f"{_name(d_model, num_experts)}: the table with its optimizer's state needs at least "
                f"{memory.gib(needed)}, --max-memory-gib is {config.max_memory_gib:g}"
            )
    if not sizes:
        raise InputError(f"nothing is measured: {skipped[0]}")
    config.output.mkdir(parents=True, exist_ok=True)
    measurements: list[Measurement] = []
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
                measurement = measure_setting(
                    layer,
                    num_tokens=num_tokens,
                    threads=threads,
                    ids=config.ids,
                    repeats=config.repeats,
                    max_bytes=max_bytes,
                    baselines=config.baselines,
                    show_progress=partial(_describe, progress, task, setting),
                )
                measurements.append(measurement)
                _write(config, measurements, skipped)
                progress.advance(task)
            del layer  # before the next one is made
    write_atomically(config.output / "layer.svg", str(view.figure(measurements)))
    _print(measurements, skipped)
    print(f"measured with {kernels_on(torch.device('cpu'))}")
    print(f"{config.output / 'layer.json'}, {config.output / 'layer.svg'}")
    return measurements


def _describe(progress: Progress, task: TaskID, setting: str, current: str) -> None:
    progress.update(task, description=f"{setting}: {current}")


def _write(config: LayerBenchmarkConfig, measurements: Sequence[Measurement], skipped: Sequence[str]) -> None:
    configuration = {**asdict(config), "output": str(config.output)}
    configuration["rivals"] = configuration.pop("baselines")
    content = {
        "machine": describe_machine(),
        "configuration": configuration,
        "results": list(map(to_json, measurements)),
        "skipped": skipped,
    }
    write_atomically(config.output / "layer.json", json.dumps(content, indent=1) + "\n")


def _print(measurements: Sequence[Measurement], skipped: Sequence[str]) -> None:
    console = print_tables(view.tables(measurements))
    left_out = [
        f"{_name(each.d_model, each.num_experts)}, M = {each.num_tokens}, threads: {each.threads}: {reason}"
        for each in measurements
        for reason in each.left_out
    ]
    for sentence in [*skipped, *left_out]:
        console.print(f"left out: {sentence}", markup=False, highlight=False, soft_wrap=True)


def print_tables(tables: Sequence[Table]) -> Console:
    """Print tables whole, also where the terminal is narrower; return the console."""
    console = Console()
    widest = max(console.measure(table, options=console.options.update(max_width=1000)).maximum for table in tables)
    if widest > console.width:  # lines that the terminal breaks lose less than cells cut short
        console = Console(width=widest)
    for table in tables:
        console.print(table)
    return console


def _name(d_model: int, num_experts: int) -> str:
    return f"D = {d_model}, N = {num_experts:,}"


def describe_machine() -> dict[str, Any]:
    """Return what the numbers depend on: the processor, its cores, the versions, the kernels, memory's huge pages."""
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
        "kernels": kernels_on(torch.device("cpu")),
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
