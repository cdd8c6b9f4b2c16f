"""Studies of PEER alone: runs that differ in a setting or two, compared along one axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyexperts.comparison.facts import NATS
from tinyexperts.comparison.findings import difference_cells, verdict_on
from tinyexperts.comparison.frame import HELD_OUT
from tinyexperts.comparison.methods import METHODS
from tinyexperts.report.page import Finding, Findings, Section
from tinyexperts.report.style import Drawing, Plot, house_style
from tinyexperts.report.table import Table
from tinyexperts.statistics.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.frame import StudyRuns, losses_at, points_of
from tinyexperts.study.analysis.paper_results import PAPER_USAGE
from tinyexperts.study.analysis.tables import COST_COLUMNS, RESULT_COLUMNS, cost_cells, result_cells
from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.scales import Scale

if TYPE_CHECKING:
    import pandas as pd

# Column of the frame of runs -> the same of the frame of points.
_POINT_COLUMNS = {HELD_OUT: "loss", NATS: "nats"}


def one_stage(make: Callable[[Scale], list[GridRun]]) -> Callable[[Scale], tuple[Stage, ...]]:
    """Return the stages of a study whose runs do not depend on results."""
    return lambda scale: (lambda losses: make(scale),)


def peer_run(
    scale: Scale,
    budget: float,
    seed: int,
    layer_changes: Mapping[str, Any],
    *,
    width: int | None = None,
    changes: Mapping[str, Any] | None = None,
    **axes: Any,
) -> GridRun:
    """Return a run of PEER, named by its axes.

    Args:
        scale (Scale): the scale.
        budget (float): training FLOPs.
        seed (int): the seed.
        layer_changes (Mapping[str, Any]): changes of the layer at this scale.
        width (int | None): the model width D; None: the scale's for ablations.
        changes (Mapping[str, Any] | None): changes of the configuration, by dotted names.
        axes (Any): its place in the grid, in addition to budget, width and seed.
    """
    width = width or scale.peer_width or scale.middle_width
    layer = replace(scale.layers["peer"], **layer_changes)
    settings = {**scale.peer_settings, **(changes or {})}
    config = scale.config(layer, width=width, budget=budget, seed=seed, **settings)
    written = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in axes.items()}
    words = "-".join(f"{name}-{value}" for name, value in written.items()).replace("_", "-")
    return GridRun(
        name=f"peer-d{width}-c{budget:.2g}-{words}-seed{seed}".replace("+", ""),
        method="peer",
        axes={"budget": budget, "width": width, "seed": seed, **axes},
        config=config,
    )


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The question of a study of PEER alone, and the tables that answer it."""

    axis: str
    """The axis that is varied."""
    claim: str = ""
    """The paper's claim about going from the first value of the axis to the last."""
    values: tuple[str, ...] = ()
    """The values of the axis from first to last, where they are words."""
    unevenness_claim: str = ""
    """The paper's claim about the experts' use."""
    reference: Callable[[GridRun], bool] | None = None
    """The point of each series that the others are compared with; None: the first."""
    reference_name: str = "first of its series"
    tables: tuple[Callable[[AblationRuns], Table | None], ...] = ()
    """Tables of this study alone; None where a study's runs have nothing for one."""

    def findings(self, runs: StudyRuns) -> Findings:
        """Return the claims, figures and tables of the study."""
        found = AblationRuns(self, runs)
        curves = [
            *([_curves(found, NATS, "loss of an answer, nats a fact")] if found.has_facts else []),
            _curves(found, HELD_OUT, "held-out loss, nats a token"),
            _curves(found, "unevenness", "unevenness, nats"),
        ]
        own = [table(found) for table in self.tables]
        tables = [found.points_table(), *(table for table in own if table is not None)]
        return Findings(
            findings=found.claims(),
            sections=[
                Section(title="Curves", drawings=tuple(drawing for drawing in curves if drawing is not None)),
                *(Section(title=table.title, tables=(table,)) for table in tables),
            ],
            repeatable=list(runs.done.drop_duplicates(found.axes).name),
        )


class AblationRuns:
    """The runs of an ablation as points: the means over seeds at each place of the grid."""

    def __init__(self, ablation: Ablation, runs: StudyRuns) -> None:
        self.ablation, self.runs = ablation, runs
        self.has_facts = bool(runs.done[NATS].notna().any())
        self.measure = NATS if self.has_facts else HELD_OUT
        names = dict.fromkeys(name for run in runs.planned.values() for name in run.axes)
        self.axes = [name for name in names if name != "seed"]
        self.points = points_of(runs.done, self.axes).sort_values(
            [*self.others(ablation.axis), ablation.axis],
            key=lambda column: column.map(self._position) if column.name == ablation.axis else column,
        )

    def _position(self, value: Any) -> Any:
        return self.ablation.values.index(value) if self.ablation.values else value

    def others(self, axis: str) -> list[str]:
        """Return the axes that stay the same along one; heads and experts a head vary with the active experts."""
        along = {axis, *(("heads", "experts_per_head") if axis == "active" else ())}
        return [name for name in self.axes if name not in along]

    def series(self, axis: str | None = None) -> dict[tuple[Any, ...], pd.DataFrame]:
        """Return the points that differ along one axis alone, ascending, by the values of the other axes."""
        axis = axis or self.ablation.axis
        points = self.points if axis == self.ablation.axis else self.points.sort_values(axis)
        return dict(iter(points.groupby(self.others(axis))))

    @cache  # noqa: B019  # one report makes one of these
    def _by_seed(self, column: str) -> pd.DataFrame:
        return self.runs.done.pivot(index=self.axes, columns="seed", values=column)

    def by_seed(self, point: Any, column: str = HELD_OUT) -> pd.Series:
        """Return the values of a point's runs in a column of the frame of runs, by seed."""
        return self._by_seed(column).loc[tuple(getattr(point, axis) for axis in self.axes)].dropna()

    def difference(self, point: Any, reference: Any, column: str = HELD_OUT) -> SeedInterval | None:
        """Return one point minus another, paired by seed."""
        return paired_difference(self.by_seed(point, column), self.by_seed(reference, column))

    def claims(self) -> list[Finding]:
        """Return a verdict on the ends of the axis against each other, for everything else that varies."""
        axis, others = self.ablation.axis, self.others(self.ablation.axis)
        coming = set(self.runs.to_come[others].itertuples(index=False, name=None))
        claims = []
        for key, frame in self.series().items() if self.ablation.claim else ():
            points = list(frame.itertuples())
            if len(points) < 2:
                continue
            first, last = points[0], points[-1]
            ends = f"{value_text(getattr(last, axis))} against {value_text(getattr(first, axis))}"
            pairs = zip(others, key, strict=True)
            where = ", ".join(f"{name.replace('_', ' ')} {value_text(value)}" for name, value in pairs)
            columns = {self.measure: self.ablation.claim, "unevenness": self.ablation.unevenness_claim}
            claims += [
                verdict_on(
                    f"{where}: {claim} ({ends})",
                    self.difference(last, first, column),
                    is_finished=key not in coming,
                )
                for column, claim in columns.items()
                if claim
            ]
        return claims

    def points_table(self) -> Table:
        """Return the table of every point of the grid."""
        rows, without_router = [], []
        for points in self.series().values():
            reference = self._reference(list(points.itertuples()))
            for point in points.itertuples():
                is_compared = reference is not None and point.name != reference.name
                without_router.append(self._without_router(point, reference) if is_compared else None)
                compared_by = {HELD_OUT: 3} | ({NATS: 2} if self.has_facts else {})
                rows.append(
                    (
                        *(value_text(getattr(point, name)) for name in self.axes),
                        *cost_cells(point),
                        *result_cells(point),
                        f"{math.exp(point.loss):.2f}",
                        *((f"{point.nats:.2f}", f"{100 * point.recall:.1f}") if self.has_facts else ()),
                        *(
                            cell
                            for column, digits in compared_by.items()
                            for cell in difference_cells(
                                self.difference(point, reference, column) if is_compared else None, digits
                            )
                        ),
                    )
                )
        is_known = any(without_router)  # a study of one budget does not know it
        if is_known:
            rows = [(*row, *difference_cells(found)) for row, found in zip(rows, without_router, strict=True)]
        return Table(
            name="points",
            title="Every point of the grid",
            columns=(
                *(name.replace("_", " ") for name in self.axes),
                *COST_COLUMNS,
                *RESULT_COLUMNS,
                "perplexity",
                *(("nats a fact", "recall, %") if self.has_facts else ()),
                *(f"loss against the {self.ablation.reference_name}", "95 % interval"),
                *(("nats a fact against it", "their 95 % interval") if self.has_facts else ()),
                *(("the same, router not counted", "its 95 % interval") if is_known else ()),
            ),
            rows=tuple(rows),
            note="Router not counted: at the FLOPs of one of the two, what the other reaches between its budgets."
            if is_known
            else "",
        )

    def _reference(self, points: Sequence[Any]) -> Any | None:
        is_reference = self.ablation.reference
        if is_reference is None:
            return points[0]
        return next((point for point in points if is_reference(self.runs.planned[point.name])), None)

    def _without_router(self, point: Any, reference: Any) -> SeedInterval | None:
        """Return a point minus its reference at equal FLOPs, the routers of both left out.

        One of the two is taken where it was run, the other between its budgets; None where neither's hold the other.
        """

        def reached(other: Any, flops: float) -> pd.Series | None:
            key = tuple(getattr(other, name) for name in self.others("budget"))
            budgets = list(self.series("budget")[key].itertuples())
            costs = [each.training_flops_without_router for each in budgets]
            return losses_at(costs, [self.by_seed(each) for each in budgets], flops)

        theirs = reached(reference, point.training_flops_without_router)
        if theirs is not None:
            return paired_difference(self.by_seed(point), theirs)
        ours = reached(point, reference.training_flops_without_router)
        return None if ours is None else paired_difference(ours, self.by_seed(reference))


@house_style()
def _curves(found: AblationRuns, column: str, what: str) -> Drawing | None:
    """Draw each series as a line through its means, or words side by side; None where there is nothing to draw."""
    values = found.ablation.values
    axis = "num_experts" if values and "num_experts" in found.axes else found.ablation.axis
    words = values if axis == found.ablation.axis else ()
    position: Callable[[Any], float] = words.index if words else float
    series, others, name = found.series(axis), found.others(axis), axis.replace("_", " ")
    every = found.points[axis].map(position).to_numpy(float)
    if len(np.unique(every)) < 2 or found.points[_POINT_COLUMNS.get(column, column)].isna().any():
        return None
    varied = [number for number in range(len(others)) if len({key[number] for key in series}) > 1]
    plot = Plot(name, what)
    for number, (key, points) in enumerate(series.items()):
        color = METHODS[-1 - number % len(METHODS)].color
        x = points[axis].map(position).to_numpy(float)
        seeds = [list(found.by_seed(point, column)) for point in points.itertuples()]
        means = [float(np.mean(values)) for values in seeds]
        plot.means(
            x,
            seeds,
            means,
            color=color,
            **({"linestyle": "", "marker": "_", "markersize": 14} if words else {"linewidth": 1.8}),
        )
        label = ", ".join(_named(others[place], key[place]) for place in varied)
        plot.label_end(x[-1], means[-1], label or "PEER", color)
    if words:
        plot.axes.set_xlim(-0.4, len(words) + 0.3)
        plot.axes.set_xticks(range(len(words)), words, rotation=30, ha="right")
    elif every.min() > 0 and every.max() / every.min() > 4:
        plot.log_x(every, room=3.0)
    else:
        plot.axes.set_xlim(every.min() - 0.3, every.max() + 0.5 * (np.ptp(every) or 1))
        plot.axes.set_xticks(np.unique(every))
    title = what.partition(",")[0].capitalize()
    return plot.drawing(f"{title}-{axis}", caption=f"{title} by {name}", text=f"{title} against {name}.")


def _named(name: str, value: Any) -> str:
    return f"query norm: {value}" if name == "query_norm" else f"{value:.2g}" if name == "budget" else str(value)


def value_text(value: Any) -> str:
    """Return a value of an axis as readers see it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


def paper_usage(found: AblationRuns) -> Table | None:
    """Return the paper's own table of perplexity and usage by the number of experts; None beside facts."""
    if found.has_facts:
        return None
    rows = [
        (f"{n:,}", norm, *(f"{value:g}" for value in values))
        for n, by_norm in PAPER_USAGE.items()
        for norm, values in zip(("none", "batch"), by_norm, strict=True)
    ]
    return Table(
        name="paper-usage",
        title="The same in the paper (other data, tokens and budgets)",
        columns=("num experts", "query norm", "perplexity", "usage, %", "unevenness, nats"),
        rows=tuple(rows),
    )
