"""The compute multiplier: how many times more training FLOPs a baseline needs for the loss of a method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tinyexperts.statistics.seed_interval import Outcome, SeedInterval, paired_difference


@dataclass(frozen=True, kw_only=True)
class ComputeMultiplier:
    """The multiplier, or the reason why there is none."""

    value: float | None = None
    """The geometric mean over seeds."""
    interval: tuple[float, float] | None = None
    """The 95 % interval; None for one seed."""
    refusal: str | None = None
    """The reason, in words."""


def compute_multiplier(
    baseline: Mapping[int, Mapping[float, float]], method: Mapping[int, float], budget: float
) -> ComputeMultiplier:
    """Compute the multiplier of a method at one budget.

    Between two budgets the baseline's loss is taken as linear in their logarithm. Beyond them only the side of the
    multiplier is given, where the difference to the last budget, or to the first, has an interval without zero.

    Args:
        baseline (Mapping[int, Mapping[float, float]]): the baseline's losses (nats) by seed and budget (FLOPs).
        method (Mapping[int, float]): the method's losses by seed.
        budget (float): the method's training FLOPs.
    """
    seeds = sorted(baseline.keys() & method.keys())
    if not seeds:
        return ComputeMultiplier(refusal="the two share no seed")
    logs, beyond, before = [], [], []
    first, last = {}, {}
    for seed in seeds:
        budgets = sorted(baseline[seed])
        losses = [baseline[seed][b] for b in budgets]
        if len(budgets) < 2 or any(later >= earlier for earlier, later in pairwise(losses)):
            return ComputeMultiplier(refusal=f"the baseline's loss does not fall from budget to budget for seed {seed}")
        first[seed], last[seed] = losses[0], losses[-1]
        if method[seed] < losses[-1]:
            beyond.append(seed)
        elif method[seed] > losses[0]:
            before.append(seed)
        else:
            at = np.interp(-method[seed], [-loss for loss in losses], np.log(budgets))
            logs.append(float(at) - math.log(budget))
    if beyond and _outcome(method, last) == "lower":
        least = min(max(baseline[seed]) for seed in seeds) / budget
        return ComputeMultiplier(
            refusal=f"more than {least:.2f}: the baseline's largest budget does not reach the loss"
        )
    if before and _outcome(method, first) == "higher":
        most = max(min(baseline[seed]) for seed in seeds) / budget
        return ComputeMultiplier(refusal=f"less than {most:.2f}: the baseline's least budget is better already")
    if beyond or before:
        where = ((beyond, "beyond the largest budget"), (before, "before the least"))
        listed = ", ".join(f"{side} {len(outside)} of {len(seeds)}" for outside, side in where if outside)
        return ComputeMultiplier(refusal=f"can't tell; seeds {listed}")
    interval = SeedInterval(values=tuple(logs))
    low, high = interval.bounds
    with np.errstate(over="ignore"):
        ends = (float(np.exp(low)), float(np.exp(high)))
    return ComputeMultiplier(value=math.exp(interval.mean), interval=ends if len(seeds) > 1 else None)


def _outcome(method: Mapping[int, float], end: Mapping[int, float]) -> Outcome:
    difference = paired_difference(method, end)
    return "undecided" if difference is None else difference.outcome
