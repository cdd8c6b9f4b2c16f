"""The mean over a few seeds with Student's interval, and the one rule by which two are compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

import scipy  # brings what is called of it when it is called: stats would take a second

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95
# Numbers by seed.
BySeed: TypeAlias = Union[Mapping[int, float], "pd.Series[float]"]
Outcome = Literal["lower", "higher", "undecided"]


@dataclass(frozen=True, kw_only=True)
class SeedInterval:
    """Values of the same quantity, one a seed; the interval holds their true mean with 95 % confidence.

    Fewer than two values, or one that is not finite, say nothing about chance: the interval is then everything.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return math.fsum(self.values) / len(self.values)

    @property
    def standard_deviation(self) -> float | None:
        """The deviation over seeds; None for one, and where a value is not finite."""
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return None
        return statistics.stdev(self.values)

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95 % interval of the mean."""
        deviation = self.standard_deviation
        if deviation is None:
            return -math.inf, math.inf
        quantile = float(scipy.special.stdtrit(len(self.values) - 1, (1 + CONFIDENCE) / 2))
        half = quantile * deviation / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half

    @property
    def outcome(self) -> Outcome:
        """The side of zero on which the mean is; undecided where the interval holds zero."""
        low, high = self.bounds
        return "lower" if high < 0 else "higher" if low > 0 else "undecided"


def paired_difference(method: BySeed, baseline: BySeed) -> SeedInterval | None:
    """Return method minus baseline over the seeds that both have; None where they share none.

    Args:
        method (BySeed): the method's values by seed.
        baseline (BySeed): the baseline's values by seed.
    """
    seeds = sorted(set(method.keys()) & set(baseline.keys()))
    return SeedInterval(values=tuple(float(method[seed] - baseline[seed]) for seed in seeds)) if seeds else None
