"""Findings: what the report of a study shows, and the verdicts on the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tinyexperts.report.numbers import MISSING, signed
from tinyexperts.report.page import Finding, Sample, Section
from tinyexperts.statistics.seed_interval import SeedInterval


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The part of a report's page that depends on the study."""

    findings: Sequence[Finding]
    sections: Sequence[Section]
    doubts: Sequence[str] = ()
    """A sentence for each reason to doubt the findings."""
    repeatable: Sequence[str] = ()
    """The names of the runs whose commands the report gives."""
    title: str = ""
    """The title of the page, where it is not the study's name."""
    samples: Mapping[str, tuple[Sample, ...]] | None = None
    """Texts of the models by their prompt."""
    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts to look up, by title."""


def verdict_on(
    claim: str, difference: SeedInterval | None, *, is_finished: bool = True, margins: Sequence[float] = ()
) -> Finding:
    """Return the verdict on a claim that a difference is below zero: only an interval without zero decides.

    Args:
        claim: the claim as a sentence.
        difference: the difference over seeds, in nats; None where there is nothing to compare.
        is_finished: no run of it is still to come; until then the verdict is "unfinished".
        margins: the paper's own differences (nats); the evidence says whether the interval holds them.
    """
    if difference is None:
        evidence = "no sizes and seeds to compare" if is_finished else "runs are still to come"
        return Finding(text=claim, verdict="can't tell" if is_finished else "unfinished", evidence=evidence)
    verdict = {"lower": "reproduced", "higher": "not reproduced", "undecided": "can't tell"}[difference.outcome]
    seeds = "one seed" if len(difference.values) == 1 else f"{len(difference.values)} seeds"
    interval = format_interval(difference)
    chance = "no interval" if interval == MISSING else f"95 % interval {interval}"
    evidence = f"{signed(difference.mean)} nats, {chance}, {seeds}"
    if margins and interval != MISSING:
        low, high = difference.bounds
        held = sum(low <= margin <= high for margin in margins)
        where = "outside of it" if held == 0 else "inside it" if held == len(margins) else f"{held} of them inside it"
        evidence += f"; the paper's margins, {' and '.join(map(signed, margins))}, {where}"
    return Finding(text=claim, verdict=verdict if is_finished else "unfinished", evidence=evidence)


def format_interval(difference: SeedInterval) -> str:
    """Return the 95 % interval, or a dash where nothing bounds it."""
    low, high = difference.bounds
    return f"{signed(low)} to {signed(high)}" if math.isfinite(low) else MISSING


def difference_cells(found: SeedInterval | None) -> tuple[str, str]:
    """Return a difference and its interval as cells of a table."""
    return (MISSING, MISSING) if found is None else (signed(found.mean), format_interval(found))
