"""The verdicts on the paper's claims, and differences as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinyexperts.report.numbers import MISSING, signed
from tinyexperts.report.page import Finding
from tinyexperts.statistics.seed_interval import SeedInterval


def verdict_on(
    claim: str,
    difference: SeedInterval | None,
    *,
    is_finished: bool = True,
    margins: Sequence[float] = (),
    unit: str = "nats",
    digits: int = 3,
    words: tuple[str, str] = ("reproduced", "not reproduced"),
) -> Finding:
    """Return the verdict on a claim that a difference is below zero: only an interval without zero decides.

    Args:
        claim (str): the claim as a sentence.
        difference (SeedInterval | None): the difference over seeds; None where there is nothing to compare.
        is_finished (bool): no run of it is still to come; until then the verdict is "unfinished".
        margins (Sequence[float]): the paper's own differences (nats); the evidence says whether the interval holds
            them.
        unit (str): the unit of the difference.
        digits (int): its decimals.
        words (tuple[str, str]): the verdicts on a difference below and above zero.
    """
    if difference is None:
        evidence = "no sizes and seeds to compare" if is_finished else "runs are still to come"
        return Finding(text=claim, verdict="can't tell" if is_finished else "unfinished", evidence=evidence)
    verdict = {"lower": words[0], "higher": words[1], "undecided": "can't tell"}[difference.outcome]
    seeds = "one seed" if len(difference.values) == 1 else f"{len(difference.values)} seeds"
    interval = format_interval(difference, digits)
    chance = "no interval" if interval == MISSING else f"95 % interval {interval}"
    evidence = f"{signed(difference.mean, digits)} {unit}, {chance}, {seeds}"
    if margins and interval != MISSING:
        low, high = difference.bounds
        held = sum(low <= margin <= high for margin in margins)
        where = "outside of it" if held == 0 else "inside it" if held == len(margins) else f"{held} of them inside it"
        evidence += f"; the paper's margins, {' and '.join(map(signed, margins))}, {where}"
    return Finding(text=claim, verdict=verdict if is_finished else "unfinished", evidence=evidence)


def format_interval(difference: SeedInterval, digits: int = 3) -> str:
    """Return the 95 % interval, or a dash where nothing bounds it."""
    low, high = difference.bounds
    return f"{signed(low, digits)} to {signed(high, digits)}" if math.isfinite(low) else MISSING


def difference_cells(found: SeedInterval | None, digits: int = 3) -> tuple[str, str]:
    """Return a difference and its interval as cells of a table."""
    return (MISSING, MISSING) if found is None else (signed(found.mean, digits), format_interval(found, digits))
