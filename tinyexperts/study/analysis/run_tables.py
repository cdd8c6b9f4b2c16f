"""What every study's report tells of its runs: what each point costs, each run by itself, and how to run it again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyexperts.report.numbers import MISSING, format_count
from tinyexperts.report.table import Table
from tinyexperts.study.analysis.study_points import Group, Point
from tinyexperts.study.study import GridRun
from tinyexperts.study.train_command import train_command

COST_COLUMNS = (
    *("active", "total", "matmul parameters", "tokens", "training FLOPs", "without router"),
    "bytes a token, forward",
)
RESULT_COLUMNS = ("loss", "deviation over seeds", "usage, %", "unevenness, nats", "seeds")


def cost_cells(group: Group) -> tuple[str, ...]:
    """What a run of the group costs: the cells of COST_COLUMNS."""
    cost = group.first.cost
    return (
        *(format_count(n) for n in (cost.parameters_active, cost.parameters_total, cost.parameters_matmul)),
        format_count(cost.num_tokens),
        f"{cost.training_flops:.3e}",
        f"{cost.training_flops_without_router:.3e}",
        format_count(cost.forward_bytes),
    )


def result_cells(group: Group) -> tuple[str, ...]:
    """What the runs of the group reached: the cells of RESULT_COLUMNS."""
    deviation = group.standard_deviation()
    return (
        f"{group.mean_loss():.3f}",
        MISSING if deviation is None else f"{deviation:.3f}",
        *group.usage_told(),
        str(len(group.points)),
    )


def runs_table(points: Sequence[Point]) -> Table:
    """Every run that is done."""
    texts = list(dict.fromkeys(text for point in points for text in point.losses))
    speeds = [point.cost.training_flops / point.seconds for point in points if point.seconds > 0]
    median = f" The median is {statistics.median(speeds):.2g}." if speeds else ""
    return Table(
        name="runs",
        title="Every run",
        columns=("run", "seconds of training", "training FLOPs a second", *(f"loss, {text}" for text in texts)),
        rows=tuple(
            (
                point.run.name,
                f"{point.seconds:.0f}",
                f"{point.cost.training_flops / point.seconds:.2e}" if point.seconds > 0 else MISSING,
                *(f"{point.losses[text]:.4f}" if text in point.losses else MISSING for text in texts),
            )
            for point in points
        ),
        note="Losses in nats a token. FLOPs a second depend on what else the machine did." + median,
        is_folded=True,
    )


def commands_table(runs: Sequence[GridRun], evaluation_tokens: int | None) -> Table:
    """How to run each row of the grid, and of the tuning, again by itself."""
    rows = [(run.name, train_command(run.method, replace(run.config, run=Path("runs", run.name)))) for run in runs]
    return Table(
        name="commands",
        title="To run a row again",
        columns=("run", "command"),
        rows=tuple(rows),
        note="Other seeds by --seed and --run; then tinyexperts evaluate and the run's folder, with --files for other "
        "texts than the held-out one" + (f", and --max-tokens {evaluation_tokens}." if evaluation_tokens else "."),
        is_folded=True,
    )
