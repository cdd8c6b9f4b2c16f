"""What the numbers of two methods allow to be said: one method against a baseline, seed by seed, in plain sentences.

The rule: a difference counts only where zero lies outside of its 95 % interval (Student's, paired by seed); with one
seed there is nothing to judge chance by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinyexperts.report.numbers import signed
from tinyexperts.study.analysis.fits.seed_interval import SeedInterval
from tinyexperts.study.analysis.run_results import RunResult, method_label

EQUAL_FLOPS_TOLERANCE = 0.01  # a run ends on a whole step, so budgets agree only to about a step
Outcome = Literal["lower", "higher", "undecided", "one seed", "no pair"]


@dataclass(frozen=True, kw_only=True)
class SeedComparison:
    """Method against baseline for one seed: differences are method minus baseline in nats a token."""

    seed: int | None
    method: RunResult
    baseline: RunResult
    difference: float
    difference_new: float | None
    difference_stood_earlier: float | None
    difference_equal_time: float | None
    equal_time_seconds: float | None
    flops_ratio: float | None
    seconds_ratio: float | None
    tokens_per_second_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method against the baseline over all seeds that both have."""

    method: str
    baseline: str
    seeds: tuple[SeedComparison, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds of method minus baseline, held-out nats a token."""
        return math.fsum(pair.difference for pair in self.seeds) / len(self.seeds)

    @property
    def interval(self) -> SeedInterval:
        """Of method minus baseline, held-out nats a token."""
        return SeedInterval(values=tuple(pair.difference for pair in self.seeds))

    @property
    def outcome(self) -> Outcome:
        """What may be said of the method's held-out loss against the baseline's."""
        if not self.seeds:
            return "no pair"
        if len(self.seeds) == 1:
            return "one seed"
        return self.interval.outcome

    def mean_of(self, field: str) -> float | None:
        """Mean over seeds of one of the pairs' fields; None where a seed lacks it."""
        values = [getattr(pair, field) for pair in self.seeds]
        return None if not values or None in values else math.fsum(values) / len(values)

    @property
    def verdict(self) -> str:
        """Two sentences: what the held-out loss says, and where the method loses."""
        return f"{self._finding()} {self._losses()}" if self.seeds else self._finding()

    def _finding(self) -> str:
        method, baseline = method_label(self.method), method_label(self.baseline)
        if not self.seeds:
            return f"{method} and {baseline} share no seed that was evaluated for both, so they can't be compared."
        budget = self._budget()
        each = ", ".join(f"seed {pair.seed}: {signed(pair.difference)}" for pair in self.seeds)
        if self.outcome == "one seed":
            return (
                f"Can't tell from one seed: at {budget}, {method} minus {baseline} in held-out loss is "
                f"{signed(self.mean)} nats a token."
            )
        if self.outcome == "undecided":
            return (
                f"Can't tell at this scale: at {budget}, {method} minus {baseline} in held-out loss is "
                f"{signed(self.mean)} nats a token in the mean, and its 95 % interval {self._bounds()} ({each})."
            )
        return (
            f"At {budget}, {method}'s held-out loss is {abs(self.mean):.3f} nats a token {self.outcome} than "
            f"{baseline}'s in the mean of {len(self.seeds)} seeds ({each})."
        )

    def _bounds(self) -> str:
        low, high = self.interval.bounds
        return f"goes from {signed(low)} to {signed(high)}" if math.isfinite(low) else "is not known"

    def _budget(self) -> str:
        ratios = [pair.flops_ratio for pair in self.seeds]
        if None in ratios:
            return "training FLOPs that were not all recorded"
        worst = max(ratios, key=lambda ratio: abs(ratio - 1))
        if abs(worst - 1) <= EQUAL_FLOPS_TOLERANCE:
            return "equal training FLOPs, not equal time"
        return f"unequal training FLOPs ({method_label(self.method)} spent {worst:.2f} times {self.baseline}'s)"

    def _losses(self) -> str:
        method, baseline = method_label(self.method), method_label(self.baseline)
        losses = []
        speed, seconds = self.mean_of("tokens_per_second_ratio"), self.mean_of("seconds_ratio")
        if speed is not None and speed < 1:
            losses.append(f"it trains at {speed:.2f} times {baseline}'s tokens a second")
        if seconds is not None and seconds > 1:
            losses.append(f"its training took {seconds:.2f} times as long")
        equal_time = self.mean_of("difference_equal_time")
        if equal_time is not None and equal_time > 0:
            losses.append(f"it is {equal_time:.3f} nats behind at equal time, in the middle of its schedule")
        for field, tokens in (("new", "new tokens"), ("stood_earlier", "tokens whose bigram stood earlier")):
            part = self.mean_of(f"difference_{field}")
            if part is not None and all(getattr(pair, f"difference_{field}") > 0 for pair in self.seeds):
                losses.append(f"its loss on {tokens} is {part:.3f} nats higher")
        totals = {(pair.method.parameters("total"), pair.baseline.parameters("total")) for pair in self.seeds}
        if len(totals) == 1 and None not in (total := totals.pop()) and total[0] > total[1]:
            losses.append(f"it holds {total[0] / total[1]:.1f} times the parameters in memory")
        if not losses:
            return f"Beyond that, {method} lost in nothing that was measured here."
        listed = losses[0] if len(losses) == 1 else f"{', '.join(losses[:-1])}, and {losses[-1]}"
        return f"Where {method} loses: {listed}."


def compare_methods(runs: Sequence[RunResult], baseline: str) -> list[Comparison]:
    """Every other method against the baseline, paired by seed; a method without any pair is kept and says so."""
    methods = [method for method in dict.fromkeys(run.method for run in runs) if method != baseline]
    if all(run.method != baseline for run in runs):
        return []
    comparisons = []
    for method in methods:
        pairs = [
            _compare(run, twin)
            for run in runs
            for twin in runs
            if (run.method, twin.method) == (method, baseline) and run.seed == twin.seed
            if run.evaluated("loss") is not None and twin.evaluated("loss") is not None
        ]
        comparisons.append(Comparison(method=method, baseline=baseline, seeds=tuple(pairs)))
    return comparisons


def interpolate(lines: Sequence[dict[str, Any]], x: str, at: float) -> float | None:
    """Held-out loss at a point of the axis `x`, between the recorded lines; None outside of them."""
    points = [(line[x], line["loss"]) for line in lines if x in line and "loss" in line]
    if not points or not points[0][0] <= at <= points[-1][0]:
        return None
    return float(np.interp(at, *zip(*points, strict=True)))


def _compare(run: RunResult, twin: RunResult) -> SeedComparison:
    ends = [max((line["seconds"] for line in r.validation if "seconds" in line), default=None) for r in (run, twin)]
    at = None if None in ends else min(ends)
    at_equal_time = [None if at is None else interpolate(r.validation, "seconds", at) for r in (run, twin)]
    return SeedComparison(
        seed=run.seed,
        method=run,
        baseline=twin,
        difference=run.evaluated("loss") - twin.evaluated("loss"),
        difference_new=_minus(run.evaluated("loss_by_copy", "new"), twin.evaluated("loss_by_copy", "new")),
        difference_stood_earlier=_minus(
            run.evaluated("loss_by_copy", "stood_earlier"), twin.evaluated("loss_by_copy", "stood_earlier")
        ),
        difference_equal_time=_minus(*at_equal_time),
        equal_time_seconds=at,
        flops_ratio=_ratio(run.last.get("training_flops"), twin.last.get("training_flops")),
        seconds_ratio=_ratio(run.last.get("seconds"), twin.last.get("seconds")),
        tokens_per_second_ratio=_ratio(run.tokens_per_second, twin.tokens_per_second),
    )


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
