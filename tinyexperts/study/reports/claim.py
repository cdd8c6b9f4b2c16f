"""A claim of the paper, and the verdict on it that a study allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinyexperts.study.fits.seed_interval import SeedInterval
from tinyexperts.study.reports.comparison import signed
from tinyexperts.study.reports.table import MISSING


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, the verdict on it at this scale, and what stands behind that."""

    claim: str
    verdict: str
    evidence: str


def judged(claim: str, difference: SeedInterval | None, *, is_finished: bool = True) -> Claim:
    """The verdict on a claim that a difference is below zero: only an interval that leaves out zero decides.

    While runs are still to come it is "unfinished".
    """
    if difference is None:
        evidence = "no sizes and seeds to compare" if is_finished else "runs are still to come"
        return Claim(claim=claim, verdict="can't tell" if is_finished else "unfinished", evidence=evidence)
    verdict = {"lower": "reproduced", "higher": "not reproduced", "undecided": "can't tell"}[difference.outcome]
    if not is_finished:
        verdict = "unfinished"
    seeds = "one seed" if len(difference.values) == 1 else f"{len(difference.values)} seeds"
    interval = interval_told(difference)
    chance = "no interval" if interval == MISSING else f"95 % interval {interval}"
    return Claim(claim=claim, verdict=verdict, evidence=f"{signed(difference.mean)} nats, {chance}, {seeds}")


def interval_told(difference: SeedInterval) -> str:
    """The 95 % interval; a dash where nothing bounds it."""
    low, high = difference.bounds
    return f"{signed(low)} to {signed(high)}" if math.isfinite(low) else MISSING
