"""A claim of the paper, and the verdict on it that a study allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinyexperts.report.numbers import MISSING, signed
from tinyexperts.study.analysis.fits.seed_interval import SeedInterval


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, the verdict on it at this scale, and what stands behind that."""

    claim: str
    verdict: str
    evidence: str


def verdict_on(
    claim: str, difference: SeedInterval | None, *, is_finished: bool = True, margins: Sequence[float] = ()
) -> Claim:
    """The verdict on a claim that a difference is below zero: only an interval that leaves out zero decides.

    While runs are still to come it is "unfinished". Of the paper's own margins (nats) the evidence says whether the
    interval holds them.
    """
    if difference is None:
        evidence = "no sizes and seeds to compare" if is_finished else "runs are still to come"
        return Claim(claim=claim, verdict="can't tell" if is_finished else "unfinished", evidence=evidence)
    verdict = {"lower": "reproduced", "higher": "not reproduced", "undecided": "can't tell"}[difference.outcome]
    if not is_finished:
        verdict = "unfinished"
    seeds = "one seed" if len(difference.values) == 1 else f"{len(difference.values)} seeds"
    interval = format_interval(difference)
    chance = "no interval" if interval == MISSING else f"95 % interval {interval}"
    evidence = f"{signed(difference.mean)} nats, {chance}, {seeds}"
    if margins and interval != MISSING:
        low, high = difference.bounds
        held = sum(low <= margin <= high for margin in margins)
        where = "outside of it" if held == 0 else "inside it" if held == len(margins) else f"{held} of them inside it"
        evidence += f"; the paper's margins, {' and '.join(map(signed, margins))}, {where}"
    return Claim(claim=claim, verdict=verdict, evidence=evidence)


def format_interval(difference: SeedInterval) -> str:
    """The 95 % interval; a dash where nothing bounds it."""
    low, high = difference.bounds
    return f"{signed(low)} to {signed(high)}" if math.isfinite(low) else MISSING
