"""The tables and cells that the studies' reports share: what each point costs and reached, each run, each command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyexperts.report.numbers import MISSING, format_count
from tinyexperts.report.table import Table
from tinyexperts.statistics.power_law_fit import PowerLawFit, Term
from tinyexperts.study.analysis.frame import texts_of
from tinyexperts.study.grid import GridRun
from tinyexperts.study.train_command import train_command
from tinyexperts.training import TrainConfig

if TYPE_CHECKING:
    import pandas as pd

COST_COLUMNS = (
    *("active", "total", "matmul parameters", "tokens", "training FLOPs", "without router"),
    "bytes a token, forward",
)
RESULT_COLUMNS = ("loss", "deviation over seeds", "usage, %", "unevenness, nats", "seeds")
LAW_NOTE = (
    "The 95 % interval of a parameter holds the values with which the law, all else fitted anew, is no worse than "
    "chance explains, if the runs' deviations are independent; open where it goes on beyond what was searched. "
    "Intervals that overlap do not tell two methods apart, and a c whose interval is open below is no loss that any "
    "size would leave."
)


def number(value: float | None, spec: str) -> str:
    """Return a number by its format, or a dash for None and NaN."""
    return MISSING if value is None or math.isnan(value) else format(value, spec)


def cost_cells(point: Any) -> tuple[str, ...]:
    """Return the cells of COST_COLUMNS of a point (a row of frame.points_of)."""
    return (
        *(format_count(n) for n in (point.parameters_active, point.parameters_total, point.parameters_matmul)),
        format_count(point.num_tokens),
        f"{point.training_flops:.3e}",
        f"{point.training_flops_without_router:.3e}",
        format_count(point.forward_bytes),
    )


def result_cells(point: Any) -> tuple[str, ...]:
    """Return the cells of RESULT_COLUMNS of a point (a row of frame.points_of)."""
    return (
        f"{point.loss:.3f}",
        number(point.deviation, ".3f"),
        number(100 * point.usage, ".1f"),
        number(point.unevenness, ".2f"),
        str(point.num_seeds),
    )


def runs_table(runs: pd.DataFrame) -> Table:
    """Return the table of every run that is done."""
    texts, speeds = texts_of(runs), runs.training_flops / runs.seconds.where(runs.seconds > 0)
    median = f" The median is {speeds.median():.2g}." if speeds.notna().any() else ""
    rows = zip(runs.name, runs.seconds.fillna(0.0), speeds, runs[texts].to_numpy(), strict=True)
    return Table(
        name="runs",
        title="Every run",
        columns=("run", "seconds of training", "training FLOPs a second", *texts),
        rows=tuple(
            (name, f"{seconds:.0f}", number(speed, ".2e"), *(number(loss, ".4f") for loss in losses))
            for name, seconds, speed, losses in rows
        ),
        note="Losses in nats a token. FLOPs a second depend on what else the machine did." + median,
        is_folded=True,
    )


def commands_table(runs: Sequence[GridRun], evaluation_tokens: int | None) -> Table:
    """Return the table of the commands that train runs again, one by one."""
    rows = [(run.name, train_command(run.method, _in_runs(run))) for run in runs]
    return Table(
        name="commands",
        title="To run a row again",
        columns=("run", "command"),
        rows=tuple(rows),
        note="Other seeds by --seed and --run; then tinyexperts evaluate and the run's folder, with --files for other "
        "texts than the held-out one" + (f", and --max-tokens {evaluation_tokens}." if evaluation_tokens else "."),
        is_folded=True,
    )


def _in_runs(run: GridRun) -> TrainConfig:
    """Return a run's configuration with its folder, and the one of the run that it begins with, in runs/."""
    teaching = run.config.teaching
    if teaching is not None:
        teaching = replace(teaching, base=Path("runs", teaching.base.name))
    return replace(run.config, run=Path("runs", run.name), teaching=teaching)


def law_columns(terms: Sequence[Term]) -> tuple[str, ...]:
    """Return the columns of `law_cells`."""
    parameters = [column for name in _names(terms) for column in _columns(name, terms)]
    return (*parameters, "residuals, nats (root mean square)", "doubt")


def law_cells(fit: PowerLawFit, *, is_finished: bool = True) -> tuple[str, ...]:
    """Return a law's parameters with their intervals, its residuals, and the reasons to doubt it."""
    numbers = {**fit.coefficients, **fit.exponents, "c": fit.constant}
    cells: list[str] = []
    for name in _names(fit.terms):
        is_coefficient = name in fit.coefficients
        cells.append(f"{numbers[name]:.4g}" if is_coefficient else f"{numbers[name]:.3f}")
        if not is_coefficient:
            ends = zip(fit.open_ends[name], fit.intervals[name], strict=True)
            cells.append(" to ".join("open" if is_open else f"{end:.3f}" for is_open, end in ends))
    doubts = [] if is_finished else ["unfinished"]
    doubts += [f"the runs do not determine {' and '.join(fit.undetermined)}"] if fit.undetermined else []
    return *cells, f"{math.sqrt(float((fit.residuals**2).mean())):.3f}", ", ".join(doubts)


def missing_law_cells(terms: Sequence[Term], reason: str) -> tuple[str, ...]:
    """Return the row where no law was fitted."""
    return *(MISSING,) * (len(law_columns(terms)) - 1), reason


def _names(terms: Sequence[Term]) -> tuple[str, ...]:
    """Return c and each term's coefficient and exponents, as the law is read."""
    return tuple(dict.fromkeys(["c", *(name for t in terms for name in (t.coefficient, *t.exponents.values()))]))


def _columns(name: str, terms: Sequence[Term]) -> tuple[str, ...]:
    return (name,) if name in {term.coefficient for term in terms} else (name, f"{name}, 95 %")
