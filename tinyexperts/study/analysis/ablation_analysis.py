"""What an ablation says: each point's loss and expert usage, and the differences that the paper's claims are about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tinyexperts.report.numbers import MISSING, signed
from tinyexperts.report.table import Table
from tinyexperts.study.analysis.claim import Claim, format_interval, verdict_on
from tinyexperts.study.analysis.fits.power_law_fit import WITH_GRANULARITY, fit_power_law
from tinyexperts.study.analysis.fits.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.law_cells import LAW_NOTE, law_cells, law_columns, missing_law_cells
from tinyexperts.study.analysis.paper_results import PAPER_USAGE
from tinyexperts.study.analysis.run_tables import COST_COLUMNS, RESULT_COLUMNS, cost_cells, result_cells
from tinyexperts.study.analysis.study_points import Group, Point, flops_without_router, groups_of, losses_at
from tinyexperts.study.study import GridRun

# Study -> the axis that is varied, and what the paper says of going from its first value to its last.
QUESTIONS = {
    "num-experts": ("num_experts", "more experts reach a lower loss"),
    "active-experts": ("active", "more active experts reach a lower loss"),
    "granularity": ("active", "more active experts reach a lower loss"),
    "query-norm": ("query_norm", "batch normalisation of the queries lowers the loss"),
    "usage": ("query_norm", "batch normalisation of the queries lowers the loss"),
    "placement": ("block", ""),
    "optimiser": ("table_learning_rate", ""),
}
# The values that a claim goes from and to, where they are no numbers.
_NAMED_ENDS = {"query_norm": ("none", "batch")}


class AblationAnalysis:
    """Groups of seeds of a study of PEER alone."""

    def __init__(self, study: str, points: Sequence[Point], open_runs: Sequence[GridRun] = ()) -> None:
        """open_runs: those that are planned and will have points, when they are done."""
        self.study = study
        self._open = open_runs
        self.axis, self.question = QUESTIONS[study]
        self.groups = groups_of(points)

    @property
    def drawn_axis(self) -> str:
        """The one that a curve can be drawn along: the study's own, or N where that has names for values."""
        return "num_experts" if self.axis in _NAMED_ENDS else self.axis

    def series(self) -> dict[tuple[tuple[str, object], ...], list[Group]]:
        """Groups that differ in the study's axis alone, by what else they are; each ascending along the axis."""
        return self.series_along(self.axis)

    def series_along(self, axis: str) -> dict[tuple[tuple[str, object], ...], list[Group]]:
        """As `series`, along another axis of the grid."""
        found: dict[tuple[tuple[str, object], ...], list[Group]] = {}
        for group in self.groups:
            found.setdefault(_key(group.first.run, axis), []).append(group)

        def position(group: Group) -> float:
            value, names = group.first.run.axes[axis], _NAMED_ENDS.get(axis)
            return float(names.index(str(value)) if names else value)

        ordered = sorted(found, key=lambda key: tuple(value for _, value in key))
        return {key: sorted(found[key], key=position) for key in ordered}

    def tables(self) -> list[Table]:
        tables = [self._groups()]
        if self.study == "optimiser":
            tables.append(self._optimisers())
        if self.study == "granularity":
            tables.append(self._law())
        if self.study in ("usage", "query-norm", "num-experts"):
            tables.append(_papers_usage())
        return tables

    def claims(self) -> list[Claim]:
        """The ends of the axis against each other, for everything else that varies."""
        if not self.question:
            return []
        claims = []
        for key, groups in self.series().items():
            if len(groups) < 2:
                continue
            ends = " against ".join(_value(group.first.run.axes[self.axis]) for group in (groups[-1], groups[0]))
            where = ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in key)
            is_finished = key not in {_key(run, self.axis) for run in self._open}
            difference = paired_difference(groups[-1].losses(), groups[0].losses())
            claims.append(verdict_on(f"{where}: {self.question} ({ends})", difference, is_finished=is_finished))
            if self.study == "usage":
                difference = paired_difference(groups[-1].unevenness(), groups[0].unevenness())
                question = f"{where}: it makes the experts' use more even ({ends})"
                claims.append(verdict_on(question, difference, is_finished=is_finished))
        return claims

    def _groups(self) -> Table:
        names = list(dict.fromkeys(name for group in self.groups for name in group.first.run.axes if name != "seed"))
        rows, without_router = [], []
        for groups in self.series().values():
            reference = self._reference(groups)
            for group in groups:
                axes = group.first.run.axes
                is_compared = reference is not None and group is not reference
                against = paired_difference(group.losses(), reference.losses()) if is_compared else None
                without_router.append(self._without_router(group, reference) if is_compared else None)
                rows.append(
                    (
                        *(_value(axes.get(name, MISSING)) for name in names),
                        *cost_cells(group),
                        *result_cells(group),
                        f"{math.exp(group.mean_loss()):.2f}",
                        *_difference(against),
                    )
                )
        is_known = any(without_router)  # a study of one budget does not know it
        if is_known:
            rows = [(*row, *_difference(found)) for row, found in zip(rows, without_router, strict=True)]
        return Table(
            name="points",
            title="Every point of the grid",
            columns=(
                *(name.replace("_", " ") for name in names),
                *COST_COLUMNS,
                *RESULT_COLUMNS,
                "perplexity",
                f"loss against the {'middle block' if self.study == 'placement' else 'first of its series'}",
                "95 % interval",
                *(("the same, router not counted", "its 95 % interval") if is_known else ()),
            ),
            rows=tuple(rows),
            note="Router not counted: at the FLOPs of one of the two, what the other reaches between its budgets."
            if is_known
            else "",
        )

    def _without_router(self, group: Group, reference: Group) -> SeedInterval | None:
        """A group minus its reference at equal FLOPs, the routers of both left out.

        One of the two is taken where it was run, the other between its budgets; None where neither's hold the other.
        """
        reached = losses_at(flops_without_router, flops_without_router(group), self._budgets_of(reference))
        if reached is not None:
            return paired_difference(group.losses(), reached)
        reached = losses_at(flops_without_router, flops_without_router(reference), self._budgets_of(group))
        return None if reached is None else paired_difference(reached, reference.losses())

    def _budgets_of(self, group: Group) -> list[Group]:
        """The same point of the grid at all budgets, ascending."""
        return self.series_along("budget")[_key(group.first.run, "budget")]

    def _reference(self, groups: Sequence[Group]) -> Group | None:
        """What a series is compared with: its first group, and for the placement the block that the paper takes."""
        if self.study != "placement":
            return groups[0]
        of_paper = (group for group in groups if group.first.run.axes["block"] == _middle_block(group.first.run))
        return next(of_paper, None)

    def _optimisers(self) -> Table:
        """Each optimiser of the tables at its own best rate, against the first of them."""
        best: dict[str, Group] = {}
        for key, groups in self.series().items():
            seeds = set.intersection(*(set(group.losses()) for group in groups))
            if seeds:
                best[str(dict(key)["optimiser"])] = min(
                    groups, key=lambda group: math.fsum(group.losses()[seed] for seed in seeds)
                )
        reference = best.get("sparse")
        rows = []
        for name, group in best.items():
            against = None if reference is None else paired_difference(group.losses(), reference.losses())
            rows.append(
                (
                    name,
                    _value(group.first.run.axes["table_learning_rate"]),
                    *result_cells(group),
                    *_difference(None if group is reference else against),
                )
            )
        return Table(
            name="optimisers",
            title="Each optimiser of the tables at its own best rate",
            columns=("optimiser", "table learning rate", *RESULT_COLUMNS, "loss against sparse", "95 % interval"),
            rows=tuple(rows),
            note="sparse: Adam on touched rows; sparse-row: with one second moment a row; dense: AdamW on all of them.",
        )

    def _law(self) -> Table:
        points = [point for group in self.groups for point in group.points]
        try:
            fit = fit_power_law(
                WITH_GRANULARITY,
                {
                    "P": [point.cost.parameters_active for point in points],
                    "D": [point.cost.num_tokens for point in points],
                    "G": [float(point.run.axes["active"]) for point in points],
                },
                [point.loss for point in points],
            )
        except ValueError as error:
            cells = missing_law_cells(WITH_GRANULARITY, str(error))
        else:
            cells = law_cells(fit, is_finished=not self._open)
        return Table(
            name="granularity-law",
            title="L(P, D, G) = c + (g / G^gamma + a) / P^alpha + b / D^beta",
            columns=law_columns(WITH_GRANULARITY),
            rows=(cells,),
            note=f"P active parameters, D tokens, G active experts. {LAW_NOTE}",
        )


def _middle_block(run: GridRun) -> int:
    (block,) = replace(run.config.model, expert_blocks=None).blocks_with_experts
    return block


def _key(run: GridRun, axis: str) -> tuple[tuple[str, object], ...]:
    """What a run is beside the axis."""
    # Heads and experts a head go together as the number of active experts.
    left_out = {"seed", axis, *(("heads", "experts_per_head") if axis == "active" else ())}
    return tuple((name, value) for name, value in run.axes.items() if name not in left_out)


def _papers_usage() -> Table:
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


def _difference(found: SeedInterval | None) -> tuple[str, str]:
    return (MISSING, MISSING) if found is None else (signed(found.mean), format_interval(found))


def _value(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
