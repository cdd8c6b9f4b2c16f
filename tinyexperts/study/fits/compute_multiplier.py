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

    Between two budgets the baseline's loss is taken as linear in their logarithm; beyond them nothing is said but on
    which side the multiplier lies, where all seeds agree on it.
    """
    seeds = sorted(baseline.keys() & method.keys())
    if not seeds:
        return _refused("the two share no seed")
    logs, beyond, before = [], [], []
    for seed in seeds:
        budgets = sorted(baseline[seed])
        losses = [baseline[seed][b] for b in budgets]
        if len(budgets) < 2 or any(later >= earlier for earlier, later in pairwise(losses)):
            return _refused(f"the baseline's loss does not fall from budget to budget for seed {seed}")
        if method[seed] < losses[-1]:
            beyond.append(budgets[-1] / budget)
        elif method[seed] > losses[0]:
            before.append(budgets[0] / budget)
        else:
            at = np.interp(-method[seed], [-loss for loss in losses], np.log(budgets))
            logs.append(float(at) - math.log(budget))
    if len(beyond) == len(seeds):
        return _refused(f"more than {min(beyond):.2f}: for no seed a budget of the baseline reaches the loss")
    if len(before) == len(seeds):
        return _refused(f"less than {max(before):.2f}: for every seed the least budget is better already")
    if beyond or before:
        outside = [f"{len(beyond)} beyond the largest budget"] * bool(beyond)
        outside += [f"{len(before)} before the least"] * bool(before)
        return _refused(f"can't tell: of {len(seeds)} seeds {' and '.join(outside)}")
    interval = SeedInterval(values=tuple(logs))
    low, high = interval.bounds
    with np.errstate(over="ignore"):
        ends = (float(np.exp(low)), float(np.exp(high)))
    return ComputeMultiplier(value=math.exp(interval.mean), interval=ends, refusal=None)


def _refused(reason: str) -> ComputeMultiplier:
    return ComputeMultiplier(value=None, interval=None, refusal=reason)
