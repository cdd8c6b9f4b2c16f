"""How many times more training FLOPs a baseline needs for the loss that a method reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tinyexperts.study.fits.seed_interval import SeedInterval


@dataclass(frozen=True, kw_only=True)
class ComputeMultiplier:
    """The multiplier (geometric mean over seeds) and its 95 % interval; or, in words, why there is none."""

    value: float | None
    interval: tuple[float, float] | None
    refusal: str | None


def compute_multiplier(
    baseline: Mapping[int, Mapping[float, float]], method: Mapping[int, float], budget: float
) -> ComputeMultiplier:
    """From the losses (nats) of a baseline by seed and budget (FLOPs), and those of a method by seed at one budget.

    Between two budgets the baseline's loss is taken as linear in their logarithm; beyond them nothing is said.
    """
    logs = []
    for seed in sorted(baseline.keys() & method.keys()):
        budgets = sorted(baseline[seed])
        losses = [baseline[seed][b] for b in budgets]
        if len(budgets) < 2 or any(later >= earlier for earlier, later in pairwise(losses)):
            return _refused(f"the baseline's loss does not fall from budget to budget for seed {seed}")
        if method[seed] < losses[-1]:
            return _refused(
                f"more than {budgets[-1] / budget:.2f}: for seed {seed} no budget of the baseline reaches the loss"
            )
        if method[seed] > losses[0]:
            return _refused(f"less than {budgets[0] / budget:.2f}: for seed {seed} the least budget is better already")
        logs.append(float(np.interp(-method[seed], [-loss for loss in losses], np.log(budgets))) - math.log(budget))
    if not logs:
        return _refused("the two share no seed")
    interval = SeedInterval(values=tuple(logs))
    low, high = interval.bounds
    with np.errstate(over="ignore"):
        ends = (float(np.exp(low)), float(np.exp(high)))
    return ComputeMultiplier(value=math.exp(interval.mean), interval=ends, refusal=None)


def _refused(reason: str) -> ComputeMultiplier:
    return ComputeMultiplier(value=None, interval=None, refusal=reason)
