"""The experts' forward pass with tables of fewer bits, in turns with that of fp32: what quantization gains.

`tinyexperts bench tables` runs it. Tokens and router weights are fp32; ids are uniform.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from tinyexperts.bench.check import check_experts, check_quantized_experts
from tinyexperts.bench.inputs import pool_size
from tinyexperts.bench.measurement import torch_threads
from tinyexperts.bench.run import describe_machine, print_tables
from tinyexperts.bench.timing import Spread, interleaved, timed
from tinyexperts.errors import InputError, require_at_least
from tinyexperts.files import write_atomically
from tinyexperts.ops import expert_mlp, quantize_groups, quantize_vectors
from tinyexperts.ops.cpu import huge_pages
from tinyexperts.training.config import path_of

KINDS = ("fp32", "bf16", "int8", "4 bits")

_MAX_CHECKED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class StoredTable:
    """A table [N, E, D], or its integers and their scales."""

    table: Tensor
    scales: Tensor | None = None

    @property
    def row_bytes(self) -> int:
        """The bytes of an expert, with its scales."""
        parts = [self.table] if self.scales is None else [self.table, self.scales]
        return sum(part[0].numel() * part.element_size() for part in parts)


@dataclass(frozen=True, kw_only=True)
class TablesMeasurement:
    """The forward pass of one setting, by the kind of table."""

    d_model: int
    num_experts: int
    num_tokens: int
    threads: int
    retrieved: int
    """Experts of a token."""
    bytes_per_token: dict[str, int]
    """The bytes of the table that a token reads."""
    forward_seconds: dict[str, Spread]
    ratio: dict[str, Spread]
    """The time of fp32 over the kind's, round by round."""


@dataclass(frozen=True, kw_only=True)
class TablesBenchmarkConfig:
    """The grid of settings, and the folder of the results."""

    d_model: tuple[int, ...] = (256, 1024)
    """Widths D."""
    num_experts: int = 2**18
    """Experts N of a table."""
    retrieved: int = 128
    """Experts of a token."""
    num_tokens: tuple[int, ...] = (1, 1024)
    """Tokens of a batch M."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads."""
    repeats: int = 9
    """Rounds that a median is taken over."""
    output: Path = Path("runs/bench")
    """Folder of tables.json."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", path_of("output", self.output))
        for name in ("d_model", "num_tokens", "threads"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} must be one or more numbers of at least 1, got {values}")
        for name in ("num_experts", "retrieved", "repeats"):
            require_at_least(1, "--" + name.replace("_", "-"), getattr(self, name))


def stored_tables(table_NED: Tensor) -> dict[str, StoredTable]:
    """Return a table in all KINDS.

    Args:
        table_NED (float32, [N, E, D]): the table, which is that of "fp32".
    """
    return {
        "fp32": StoredTable(table=table_NED),
        "bf16": StoredTable(table=huge_pages.empty(*table_NED.shape, dtype=torch.bfloat16).copy_(table_NED)),
        **{
            name: StoredTable(table=table, scales=scales)
            for name, (table, scales) in (
                ("int8", quantize_vectors(table_NED)),
                ("4 bits", quantize_groups(table_NED)),
            )
        },
    }


def measure_tables(
    tables: dict[str, StoredTable],
    *,
    num_tokens: int,
    retrieved: int,
    activation: str | None,
    threads: int,
    repeats: int,
) -> TablesMeasurement:
    """Check the kernels, then measure the forward pass of each kind of table in turns.

    Args:
        tables (dict[str, StoredTable]): those of `stored_tables`.
        num_tokens (int): tokens of a batch M.
        retrieved (int): experts of a token.
        activation (str | None): the experts' activation.
        threads (int): CPU threads.
        repeats (int): rounds that a median is taken over.

    Raises:
        InputError: a kernel differs from the reference.
    """
    generator = torch.Generator().manual_seed(0)
    num_experts, _, d_model = tables["fp32"].table.shape
    shape = (pool_size(num_tokens), num_tokens, retrieved)
    x = torch.randn(*shape[:2], d_model, generator=generator)
    ids = torch.randint(num_experts, shape, generator=generator)
    weights = torch.rand(shape, generator=generator)
    batches = cycle(list(zip(x, ids, weights, strict=True)))

    def forward(stored: StoredTable) -> Callable[[], tuple[float]]:
        def call() -> Tensor:
            x_MD, ids_MP, weights_MP = next(batches)
            return expert_mlp(x_MD, stored.table, ids_MP, weights_MP, activation, scales=stored.scales)

        return timed(call)

    with torch_threads(threads):
        few_x, few_ids, few_weights = (each[0, :_MAX_CHECKED_TOKENS] for each in (x, ids, weights))
        for stored in tables.values():
            if stored.scales is None:
                check_experts(few_x, stored.table, few_ids, few_weights, activation, generator)
            else:
                check_quantized_experts(few_x, stored.table, stored.scales, few_ids, few_weights, activation, generator)
        with torch.no_grad():
            times = interleaved({name: forward(stored) for name, stored in tables.items()}, repeats)
    seconds = {name: rounds[:, 0] for name, rounds in times.items()}
    return TablesMeasurement(
        d_model=d_model,
        num_experts=num_experts,
        num_tokens=num_tokens,
        threads=threads,
        retrieved=retrieved,
        bytes_per_token={name: retrieved * stored.row_bytes for name, stored in tables.items()},
        forward_seconds={name: Spread.of(each) for name, each in seconds.items()},
        ratio={name: Spread.of(seconds["fp32"] / each) for name, each in seconds.items()},
    )


def run_tables_benchmark(config: TablesBenchmarkConfig) -> list[TablesMeasurement]:
    """Measure every setting with experts (u, v), print a table and write tables.json.

    Args:
        config (TablesBenchmarkConfig): the settings.

    Returns:
        The measurements in the order in which they were made.

    Raises:
        InputError: a kernel differs from the reference.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    measurements = []
    for d_model in config.d_model:
        numbers = huge_pages.empty(config.num_experts, 2, d_model, dtype=torch.float32)
        numbers.normal_(std=d_model**-0.5, generator=torch.Generator().manual_seed(0))
        tables = stored_tables(numbers)
        for threads, num_tokens in product(config.threads, config.num_tokens):
            measurements.append(
                measure_tables(
                    tables,
                    num_tokens=num_tokens,
                    retrieved=config.retrieved,
                    activation="gelu",
                    threads=threads,
                    repeats=config.repeats,
                )
            )
        del numbers, tables  # before the next ones are made
    content = {
        "machine": describe_machine(),
        "configuration": {**asdict(config), "output": str(config.output)},
        "results": list(map(asdict, measurements)),
    }
    write_atomically(config.output / "tables.json", json.dumps(content, indent=1) + "\n")
    print_tables([table_of(measurements)])
    print(config.output / "tables.json")
    return measurements


def table_of(measurements: Sequence[TablesMeasurement]) -> Table:
    """Return the measurements for the terminal."""
    table = Table(
        title="The experts' forward pass by table; ratio: the time of fp32 over it, median (quartiles)",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for heading in ("D", "N", "M", "threads", "table", "KiB/token", "ms", "ratio"):
        table.add_column(heading, justify="left" if heading == "table" else "right", no_wrap=True)
    for each in measurements:
        sizes = (each.d_model, each.num_experts, each.num_tokens, each.threads)
        for kind in KINDS:
            ratio = each.ratio[kind]
            table.add_row(
                *map("{:,}".format, sizes),
                kind,
                f"{each.bytes_per_token[kind] / 1024:,.1f}",
                f"{1e3 * each.forward_seconds[kind].median:.3g}",
                f"{ratio.median:.2f} ({ratio.lower_quartile:.2f}-{ratio.upper_quartile:.2f})",
            )
    return table
