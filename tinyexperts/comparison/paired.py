"""One method against a baseline, seed by seed, in plain sentences.

A difference counts only where zero is outside of its 95 % interval (Student's, paired by seed); one seed has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyexperts.comparison.frame import HELD_OUT, frame_of
from tinyexperts.comparison.methods import label_of
from tinyexperts.comparison.results import Results
from tinyexperts.report.numbers import signed
from tinyexperts.statistics.seed_interval import SeedInterval

if TYPE_CHECKING:
    import pandas as pd

EQUAL_FLOPS_TOLERANCE = 0.01  # a run ends on a whole step, so budgets agree only to about a step
_DIFFERENCES = (HELD_OUT, "new", "stood_earlier", "loss_when_first_ended")
_RATIOS = ("training_flops", "tokens_per_second", "seconds")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method against the baseline over all seeds that both have."""

    method: str
    baseline: str
    ours: pd.DataFrame
    """One row a seed: the method's run."""
    theirs: pd.DataFrame
    """One row a seed: the baseline's run."""

    @property
    def seeds(self) -> list[int | None]:
        """The seeds that both have."""
        return [results.seed for results in self.ours.results]

    @property
    def differences(self) -> pd.DataFrame:
        """Method minus baseline by seed, in nats a token."""
        return self.ours[[*_DIFFERENCES]].astype(float) - self.theirs[[*_DIFFERENCES]].astype(float)

    @property
    def ratios(self) -> pd.DataFrame:
        """Method divided by baseline by seed."""
        return self.ours[[*_RATIOS]].astype(float) / self.theirs[[*_RATIOS]].astype(float)

    def interval(self, column: str = HELD_OUT, *, factor: float = 1.0) -> SeedInterval:
        """Return method minus baseline in a column of the frame, times a factor."""
        differences = self.ours[column].astype(float) - self.theirs[column].astype(float)
        return SeedInterval(values=tuple(factor * differences))

    @property
    def budget(self) -> str:
        """The training FLOPs of the two in words: equal, or how unequal."""
        ratios = self.ratios.training_flops
        if ratios.isna().any():
            return "training FLOPs that were not all recorded"
        worst = ratios.loc[(ratios - 1).abs().idxmax()]
        if abs(worst - 1) <= EQUAL_FLOPS_TOLERANCE:
            return "equal training FLOPs, not equal time"
        spent = f"{label_of(self.method)} spent {worst:.2f} times {label_of(self.baseline)}'s"
        return f"unequal training FLOPs ({spent})"

    @property
    def verdict(self) -> str:
        """Two sentences: the difference of the held-out losses, and where the method loses."""
        method, baseline = label_of(self.method), label_of(self.baseline)
        if not self.seeds:
            return f"{method} and {baseline} share no seed that was evaluated for both, so they can't be compared."
        return f"{self._finding(method, baseline)} {self._losses(method)}"

    def _finding(self, method: str, baseline: str) -> str:
        found = self.interval()
        what = f"{self.budget}, {method} minus {baseline} in held-out loss is {signed(found.mean)} nats a token"
        if len(self.seeds) == 1:
            return f"Can't tell from one seed: at {what}."
        pairs = zip(self.seeds, found.values, strict=True)
        each = ", ".join(f"seed {seed}: {signed(difference)}" for seed, difference in pairs)
        if found.outcome == "undecided":
            low, high = found.bounds
            bounds = f"goes from {signed(low)} to {signed(high)}" if math.isfinite(low) else "is not known"
            return f"Can't tell at this scale: at {what} in the mean, and its 95 % interval {bounds} ({each})."
        return (
            f"At {self.budget}, {method}'s held-out loss is {abs(found.mean):.3f} nats a token {found.outcome} than "
            f"{baseline}'s in the mean of {len(self.seeds)} seeds ({each})."
        )

    def _losses(self, method: str) -> str:
        losses = []
        ratios, differences = self.ratios.mean(skipna=False), self.differences.mean(skipna=False)
        if ratios.tokens_per_second < 1:
            losses.append(f"it trains at {ratios.tokens_per_second:.2f} times {self.baseline}'s tokens a second")
        if ratios.seconds > 1:
            losses.append(f"its training took {ratios.seconds:.2f} times as long")
        if differences.loss_when_first_ended > 0:
            behind = f"{differences.loss_when_first_ended:.3f} nats behind"
            losses.append(f"it is {behind} when the first of the two has ended, the other in mid-schedule")
        for part, tokens in (("new", "new tokens"), ("stood_earlier", "tokens whose bigram stood earlier")):
            if (self.differences[part] > 0).all():
                losses.append(f"its loss on {tokens} is {differences[part]:.3f} nats higher")
        totals = self.ours.parameters_total / self.theirs.parameters_total
        if totals.nunique() == 1 and totals.notna().all() and totals.iloc[0] > 1:
            losses.append(f"it holds {totals.iloc[0]:.1f} times the parameters in memory")
        if not losses:
            return f"Beyond that, {method} lost in nothing that was measured here."
        listed = losses[0] if len(losses) == 1 else f"{', '.join(losses[:-1])}, and {losses[-1]}"
        return f"Where {method} loses: {listed}."


def compare_methods(runs: Sequence[Results], baseline: str) -> list[Comparison]:
    """Compare every other method with the baseline, paired by seed; one without a pair is kept and says so.

    Args:
        runs (Sequence[Results]): the runs of all methods.
        baseline (str): the name of the baseline.

    Returns:
        A comparison for each other method; none where the baseline has no run.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    if baseline not in methods:
        return []
    evaluated = [run for run in runs if run.evaluated("loss") is not None]
    comparisons = []
    for method in methods:
        if method == baseline:
            continue
        pairs = [
            (ours, theirs)
            for ours in evaluated
            for theirs in evaluated
            if (ours.method, theirs.method) == (method, baseline) and ours.seed == theirs.seed
        ]
        when_first_ended = [_losses_when_first_ended(*pair) for pair in pairs]
        frames = [
            frame_of(side, loss_when_first_ended=[losses[number] for losses in when_first_ended])
            for number, side in enumerate(([ours for ours, _ in pairs], [theirs for _, theirs in pairs]))
        ]
        comparisons.append(Comparison(method=method, baseline=baseline, ours=frames[0], theirs=frames[1]))
    return comparisons


def interpolate(lines: Sequence[dict[str, Any]], x: str, at: float) -> float | None:
    """Return the held-out loss at a point of an axis, between the recorded lines; None outside of them.

    Args:
        lines (Sequence[dict[str, Any]]): lines of metrics.
        x (str): the name of the axis in the lines.
        at (float): the point.
    """
    points = [(line[x], line["loss"]) for line in lines if x in line and "loss" in line]
    if not points or not points[0][0] <= at <= points[-1][0]:
        return None
    xs, losses = np.array(points, dtype=float).T
    return float(np.interp(at, xs, losses))


def first_end(*runs: Results) -> float | None:
    """Return the seconds of training after which the first of the runs had ended; None where one has no record."""
    ends = [max((float(line["seconds"]) for line in run.validation if "seconds" in line), default=None) for run in runs]
    known = [end for end in ends if end is not None]
    return min(known) if len(known) == len(ends) else None


def _losses_when_first_ended(*runs: Results) -> list[float]:
    at = first_end(*runs)
    losses = [None if at is None else interpolate(run.validation, "seconds", at) for run in runs]
    return [math.nan if loss is None else loss for loss in losses]
