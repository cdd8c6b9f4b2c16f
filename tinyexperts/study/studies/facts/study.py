"""The findings of the study of facts: each method at its own best width, on seeds that did not choose it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tinyexperts.comparison.facts import MEASURES, NATS, RECALL, measure_means, measure_names
from tinyexperts.comparison.figures import training_curves
from tinyexperts.comparison.findings import difference_cells, verdict_on
from tinyexperts.comparison.methods import label_of, look_of
from tinyexperts.report.numbers import MISSING
from tinyexperts.report.page import Finding, Findings, Section
from tinyexperts.report.style import Drawing, Plot, house_style
from tinyexperts.report.table import Table
from tinyexperts.statistics.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.frame import StudyRuns, losses_at
from tinyexperts.study.analysis.tables import number
from tinyexperts.study.studies.facts.grid import stages, timed_budget
from tinyexperts.study.studies.isoflop.analysis import BASELINES, NAMES, IsoFlopAnalysis
from tinyexperts.study.studies.isoflop.figures import isoflop_curves
from tinyexperts.study.studies.isoflop.tables import sizes_table, tuning_table
from tinyexperts.study.study import Study

if TYPE_CHECKING:
    import pandas as pd


class FactsAnalysis:
    """The runs of the fresh seeds, next to the grid that chose their widths."""

    def __init__(self, runs: StudyRuns) -> None:
        self.grid = IsoFlopAnalysis(runs)
        self.fresh = runs.done[runs.done.stage == "fresh"]
        self.timed = runs.done[runs.done.stage == "timed"]
        self.to_come = runs.to_come
        self.budgets: list[float] = sorted(self.fresh.budget.unique())

    def by_seed(self, method: str, budget: float, column: str) -> pd.Series:
        """Return the values of a method's fresh runs at a budget, by seed."""
        runs = self.fresh[(self.fresh.method == method) & (self.fresh.budget == budget)]
        return runs.set_index("seed")[column].dropna()

    def difference(self, baseline: str, budget: float, column: str = NATS) -> SeedInterval | None:
        """Return PEER minus a baseline, each at its own best width, paired by fresh seed."""
        return paired_difference(self.by_seed("peer", budget, column), self.by_seed(baseline, budget, column))

    def seconds(self, method: str, budget: float) -> float:
        """Return the seconds of a method's runs at a budget, by the speed of a run with none beside it; NaN without.

        That run has the width of those of the budget.
        """
        runs = self.fresh[(self.fresh.method == method) & (self.fresh.budget == budget)]
        speeds = self.timed[(self.timed.method == method) & (self.timed.budget == timed_budget(budget))]
        speeds = speeds[speeds.width.isin(runs.width)]
        return float(runs.num_tokens.iloc[0] / speeds.tokens_per_second.iloc[0]) if len(speeds) else math.nan

    def difference_at_equal_seconds(self, baseline: str, budget: float, column: str = NATS) -> SeedInterval | None:
        """Return PEER minus what a baseline reaches in as many seconds, between two of its budgets; None beyond them.

        Args:
            baseline (str): the name of the baseline.
            budget (float): the budget of PEER's runs.
            column (str): the measure, a column of the frame of runs.
        """
        budgets = [each for each in self.budgets if len(self.by_seed(baseline, each, column))]
        reached = losses_at(
            [self.seconds(baseline, each) for each in budgets],
            [self.by_seed(baseline, each, column) for each in budgets],
            self.seconds("peer", budget),
        )
        return None if reached is None else paired_difference(self.by_seed("peer", budget, column), reached)

    def is_finished(self, baseline: str, budget: float) -> bool:
        """Return True if no run of PEER or of a baseline is still to come at a budget."""
        coming = self.to_come[self.to_come.budget == budget]
        return not coming.method.isin(["peer", baseline]).any()

    def claims(self) -> list[Finding]:
        """Return a verdict for each baseline at each budget, and on the control."""
        found = []
        for budget in self.budgets:
            for baseline in BASELINES:
                found.append(
                    verdict_on(
                        f"At {budget:.2g} FLOPs PEER knows the facts better than {label_of(baseline)} (nats a fact)",
                        self.difference(baseline, budget),
                        is_finished=self.is_finished(baseline, budget),
                    )
                )
        for budget in self.budgets:
            for baseline in BASELINES:
                difference = self.difference_at_equal_seconds(baseline, budget)
                if difference is not None:
                    found.append(
                        verdict_on(
                            f"In the seconds of {budget:.2g} FLOPs of PEER it knows the facts better than "
                            f"{label_of(baseline)} (nats a fact)",
                            difference,
                            is_finished=self.is_finished(baseline, budget),
                        )
                    )
        return found

    def seconds_table(self) -> Table:
        """Return the table of what each method's runs take, one at a time, and PEER minus it at equal seconds."""
        rows = []
        for budget in self.budgets:
            ours = self.seconds("peer", budget)
            for method in NAMES:
                seconds = self.seconds(method, budget)
                at_equal = [
                    difference_cells(self.difference_at_equal_seconds(method, budget, column))
                    if method != "peer"
                    else (MISSING, MISSING)
                    for column in (NATS, RECALL)
                ]
                cells = (
                    number(seconds, ",.0f"),
                    number(ours / seconds, ".2f"),
                    *(c for pair in at_equal for c in pair),
                )
                rows.append((f"{budget:.2g}", label_of(method), *cells))
        return Table(
            name="seconds",
            title="Equal seconds",
            columns=(
                *("FLOPs", "method", "seconds of a run", "PEER's, times"),
                *("PEER minus it in PEER's seconds, nats a fact", "95 % interval", "recall", "its 95 % interval"),
            ),
            rows=tuple(rows),
            note="Seconds are those of the tokens at the speed of a run of the same width that had the machine to "
            "itself. In PEER's seconds another method has more FLOPs: what it reaches there is interpolated between "
            "its budgets, in the logarithm of the seconds; beyond them nothing is known.",
        )

    def differences_table(self) -> Table:
        """Return the table of PEER minus each baseline, by every measure."""
        rows = [
            (f"{budget:.2g}", label_of(baseline), what, *difference_cells(self.difference(baseline, budget, column)))
            for budget in self.budgets
            for baseline in BASELINES
            for column, what in MEASURES.items()
        ]
        return Table(
            name="differences",
            title="PEER minus each baseline at equal training FLOPs",
            columns=("FLOPs", "baseline", "measure", "difference", "95 % interval"),
            rows=tuple(rows),
            note="Each method at its own best width, on seeds that took no part in choosing it. Fewer nats and more "
            "recall are better. Nobody can know the entities that were never seen: a method that leads there has "
            "learned something else than facts.",
        )

    def recall_table(self) -> Table:
        """Return the table of what each method recalls."""
        rows = []
        for budget in self.budgets:
            for method in NAMES:
                runs = self.fresh[(self.fresh.method == method) & (self.fresh.budget == budget)]
                if len(runs):
                    rows.append(
                        (
                            *(f"{budget:.2g}", label_of(method), str(runs.width.iloc[0]), str(len(runs))),
                            *measure_means(runs).values(),
                            number(runs.bits_per_parameter.mean(), ".3f"),
                        )
                    )
        return Table(
            name="recall",
            title="Facts that each method knows at its best width",
            columns=("FLOPs", "method", "width", "seeds", *measure_names(), "bits a parameter"),
            rows=tuple(rows),
        )


@house_style()
def _recall_by_budget(analysis: FactsAnalysis) -> Drawing | None:
    """Draw the recall of known facts against the budget, by method; None for fewer than two budgets."""
    if len(analysis.budgets) < 2:
        return None
    plot = Plot("training FLOPs", "recall of known facts, %")
    for method in NAMES:
        look = look_of(method)
        seeds = {budget: 100 * analysis.by_seed(method, budget, RECALL) for budget in analysis.budgets}
        known = {budget: list(values) for budget, values in seeds.items() if len(values)}
        if not known:
            continue
        means = [float(np.mean(values)) for values in known.values()]
        plot.means(list(known), list(known.values()), means, color=look.color, linewidth=1.8)
        plot.label_end(list(known)[-1], means[-1], look.label, look.color)
    plot.log_x(np.array(analysis.budgets), room=3.0)
    return plot.drawing(
        "recall",
        caption="Recall of known facts by budget",
        text="Share of held-out statements of known facts that each method completes, against training FLOPs.",
    )


def _findings(runs: StudyRuns) -> Findings:
    analysis = FactsAnalysis(runs)
    grid = analysis.grid
    drawings = [_recall_by_budget(analysis)]
    if analysis.budgets:
        largest = analysis.fresh[analysis.fresh.budget == analysis.budgets[-1]]
        results = [runs.results[name] for name in largest.name]
        drawings += [training_curves(results, x, "recall") for x in ("training_flops", "num_tokens", "seconds")]
    drawings += [isoflop_curves(grid, budget, count) for budget in grid.budgets for count in ("active", "total")]
    tables = (
        *(analysis.recall_table(), analysis.differences_table(), analysis.seconds_table()),
        *(sizes_table(grid), tuning_table(grid)),
    )
    return Findings(
        findings=analysis.claims(),
        sections=[
            Section(title="Curves", drawings=tuple(drawing for drawing in drawings if drawing is not None)),
            *(Section(title=table.title, tables=(table,)) for table in tables),
        ],
        doubts=grid.doubts(),
        repeatable=[*analysis.fresh.name, *analysis.timed.name, *grid.points.name, *grid.tuning.name],
    )


FACTS = Study(
    name="facts",
    summary="Facts that dense, expert-choice MoE, PKM and PEER store at equal training FLOPs.",
    question="At equal training FLOPs, does PEER know more facts than dense, expert-choice MoE and PKM?",
    stages=stages,
    is_about_facts=True,
    findings=_findings,
)
