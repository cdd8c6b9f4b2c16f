"""The isoFLOP study's analysis: each method at its own best size, against the others, and against the paper."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from tinyexperts.comparison.findings import verdict_on
from tinyexperts.comparison.frame import HELD_OUT
from tinyexperts.comparison.methods import METHODS, label_of
from tinyexperts.report.page import Finding
from tinyexperts.statistics.isoflop_fit import IsoFlopFit, fit_isoflop
from tinyexperts.statistics.power_law_fit import SIZE_AND_TOKENS, PowerLawFit, fit_power_law
from tinyexperts.statistics.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.frame import StudyRuns, losses_at, points_of, texts_of
from tinyexperts.study.analysis.paper_results import paper_margins

if TYPE_CHECKING:
    import pandas as pd

AT_EQUAL_TIME = "held out, at equal time"
NAMES = tuple(method.name for method in METHODS)
BASELINES = tuple(name for name in NAMES if name != "peer")


class IsoFlopAnalysis:
    """The main runs by method, budget, width and seed, each method's best width, and the fits."""

    def __init__(self, runs: StudyRuns) -> None:
        def main(frame: pd.DataFrame) -> pd.DataFrame:
            return frame[frame.stage == "main"].sort_values(
                ["budget", "method", "width", "seed"],
                key=lambda column: column.map(NAMES.index) if column.name == "method" else column,
            )

        self.runs, self.to_come = main(runs.done), main(runs.to_come)
        self.tuning = runs.done[runs.done.stage == "tuning"]
        self.texts = texts_of(runs.frame)
        self.points = points_of(self.runs, ["budget", "method", "width"])
        self.budgets: list[float] = sorted(self.runs.budget.unique())

    def losses(self, method: str, budget: float, column: str = HELD_OUT) -> pd.DataFrame:
        """Return a method's losses at a budget by width (rows, ascending) and seed (columns).

        Args:
            method (str): the name of the method.
            budget (float): training FLOPs.
            column (str): the loss, a column of the frame of runs.
        """
        return _at(self.runs, method, budget).pivot(index="width", columns="seed", values=column)

    def is_finished(self, method: str, budget: float) -> bool:
        """Return True if no run of a method is still to come at a budget."""
        return len(_at(self.to_come, method, budget)) == 0

    def is_compared(self, baseline: str, budget: float) -> bool:
        """Return True if no run of PEER or of a baseline is still to come at a budget."""
        return self.is_finished("peer", budget) and self.is_finished(baseline, budget)

    def best(self, method: str, budget: float) -> int | None:
        """Return the width of least mean loss over the seeds that all widths have; None without such a seed.

        A width with missing runs must not decide. While runs are to come, only the seeds that all widths have count;
        when the runs have ended, only the widths that have all seeds.
        """
        losses = self.losses(method, budget)
        if self.is_finished(method, budget):
            losses = losses.dropna()
        coming, shared = _at(self.to_come, method, budget), losses.dropna(axis=1)
        return None if shared.empty or set(coming.width) - set(losses.index) else int(shared.mean(axis=1).idxmin())

    def at_best(self, method: str, budget: float, column: str = HELD_OUT) -> pd.Series | None:
        """Return a method's losses by seed at its best width; None without one."""
        best = self.best(method, budget)
        return None if best is None else self.losses(method, budget, column).loc[best].dropna()

    def best_runs(self, method: str, budget: float) -> pd.DataFrame:
        """Return a method's runs at its best width."""
        runs = _at(self.runs, method, budget)
        return runs[runs.width == self.best(method, budget)]

    def fit(self, method: str, budget: float, count: str) -> IsoFlopFit | None:
        """Return the parabola of the loss over the size; None without a run.

        Args:
            method (str): the name of the method.
            budget (float): training FLOPs.
            count (str): the parameters that are the size: total, active or matmul.
        """
        runs = _at(self.runs, method, budget)
        return fit_isoflop(runs[f"parameters_{count}"], runs[HELD_OUT]) if len(runs) else None

    @cached_property
    def laws(self) -> dict[str, PowerLawFit]:
        """L(P, D) of all runs of a method, by method; without those that have too few different runs."""
        fits = {}
        for method in NAMES:
            runs = self.runs[self.runs.method == method]
            with contextlib.suppress(ValueError):
                sizes = {"P": runs.parameters_active, "D": runs.num_tokens}
                fits[method] = fit_power_law(SIZE_AND_TOKENS, sizes, runs[HELD_OUT])
        return fits

    def difference(self, baseline: str, budget: float, column: str = HELD_OUT) -> SeedInterval | None:
        """Return PEER minus a baseline in nats, each at its own best width.

        Args:
            baseline (str): the name of the baseline.
            budget (float): training FLOPs.
            column (str): the loss, a column of the frame of runs.
        """
        ours, theirs = self.at_best("peer", budget, column), self.at_best(baseline, budget, column)
        return None if ours is None or theirs is None else paired_difference(ours, theirs)

    def difference_with_widths_of_other_seeds(self, baseline: str, budget: float) -> SeedInterval | None:
        """Return PEER minus a baseline, each seed's run at the width that the other seeds say is best.

        No run takes part in choosing the width at which it is compared. None with fewer than two seeds.
        """

        def held_out(method: str) -> dict[int, float]:
            losses = self.losses(method, budget).dropna(axis=1)
            others = {seed: losses.drop(columns=seed).mean(axis=1) for seed in losses if len(losses.columns) > 1}
            return {seed: losses.loc[means.idxmin(), seed] for seed, means in others.items()}

        return paired_difference(held_out("peer"), held_out(baseline))

    def training_flops_without_router(self, method: str, budget: float) -> float:
        """Return the training FLOPs of a method's runs at its best width, the router left out."""
        return float(self.best_runs(method, budget).training_flops_without_router.iloc[0])

    def seconds(self, method: str, budget: float) -> float:
        """Return the seconds of a method's runs at its best width: its tokens at the median speed of that width.

        One speed for all budgets, since other work on the machine made the runs' own seconds differ.
        """
        same = self.runs[(self.runs.method == method) & (self.runs.width == self.best(method, budget))]
        return float(self.best_runs(method, budget).num_tokens.iloc[0] / same.tokens_per_second.median())

    def difference_at_equal(
        self, cost: Callable[[str, float], float], baseline: str, budget: float
    ) -> SeedInterval | None:
        """Return PEER minus what a baseline reaches at the same cost of another kind, both at their best widths.

        The baseline's budgets on both sides must be finished; there is no difference beyond them.

        Args:
            cost (Callable[[str, float], float]): the cost of a method's runs at a budget.
            baseline (str): the name of the baseline.
            budget (float): the budget of PEER's runs.
        """
        ours = self.at_best("peer", budget)
        known = [b for b in self.budgets if self.is_finished(baseline, b) and self.best(baseline, b) is not None]
        if ours is None:
            return None
        losses = [self.losses(baseline, b).loc[self.best(baseline, b)].dropna() for b in known]
        reached = losses_at([cost(baseline, b) for b in known], losses, cost("peer", budget))
        return None if reached is None else paired_difference(ours, reached)

    def differences(self, baseline: str, budget: float) -> dict[str, SeedInterval]:
        """Return PEER minus a baseline on all tokens, on parts of them, at other equal costs, and on other texts."""
        found = {
            "held out": self.difference(baseline, budget),
            "held out, tokens whose bigram is new": self.difference(baseline, budget, "new"),
            "held out, tokens whose bigram stood earlier": self.difference(baseline, budget, "stood_earlier"),
            "held out, width by the other seeds": self.difference_with_widths_of_other_seeds(baseline, budget),
            "held out, router not counted": self.difference_at_equal(
                self.training_flops_without_router, baseline, budget
            ),
            AT_EQUAL_TIME: self.difference_at_equal(self.seconds, baseline, budget),
            **{text.removeprefix("loss, "): self.difference(baseline, budget, text) for text in self.texts[1:]},
        }
        return {what: difference for what, difference in found.items() if difference is not None}

    def claims(self) -> list[Finding]:
        """Return a verdict for each baseline at each budget."""
        return [
            verdict_on(
                f"At {budget:.0e} FLOPs PEER reaches a lower loss than {label_of(baseline)}",
                self.difference(baseline, budget),
                is_finished=self.is_compared(baseline, budget),
                margins=paper_margins(baseline),
            )
            for budget in self.budgets
            for baseline in BASELINES
        ]

    def doubts(self) -> list[str]:
        """Return a sentence for every best setting or width that is the last tried, and for each lone width."""
        sentences = []
        for budget in self.budgets:
            widths = {method: list(self.losses(method, budget).index) for method in NAMES}
            alone = [f"{label_of(method)} {tried[0]}" for method, tried in widths.items() if len(tried) == 1]
            if alone:
                listed = ", ".join(alone)
                sentences.append(f"At {budget:.0e} FLOPs one width was run of each ({listed}): a better one may exist.")
            for method, tried in widths.items():
                best = self.best(method, budget)
                if len(tried) > 1 and best in (tried[0], tried[-1]):
                    what = f"the best width at {budget:.0e} FLOPs is the last that was tried, {best}"
                    sentences.append(f"{label_of(method)}: {what}.")
        for method in NAMES:
            found = {tuning_label(row): row[HELD_OUT] for _, row in self.tuning.iterrows() if row.method == method}
            default = found.pop("default", math.inf)
            settings: dict[str, dict[float, float]] = {}
            for label, loss in found.items():
                setting, factor = label.rsplit("-x", 1)
                settings.setdefault(setting, {1.0: default})[float(factor)] = loss
            for setting, losses in settings.items():
                best_factor = min(losses, key=lambda factor: losses[factor])
                if best_factor != 1.0 and best_factor in (min(losses), max(losses)):
                    what = f"the best {setting} is the last that was tried, {best_factor:g} times the default"
                    sentences.append(f"{label_of(method)}: {what}.")
        return sentences


def _at(runs: pd.DataFrame, method: str, budget: float) -> pd.DataFrame:
    return runs[(runs.method == method) & (runs.budget == budget)]


def tuning_label(run: pd.Series) -> str:
    """Return the label of a tuning run: `default`, or a setting and its factor, as in `head-x2`."""
    return str(run["name"]).removeprefix(f"tune-{run.method}-").rsplit("-seed", 1)[0]
