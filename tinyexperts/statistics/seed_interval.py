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
        half = _half_width(deviation, len(self.values))
        return self.mean - half, self.mean + half

    def num_values_for(self, half_width: float, *, at_most: int) -> int | None:
        """Return how many values, these among them, give an interval of +- half_width if their deviation stays.

        Args:
            half_width (float): what the interval may reach to each side of the mean.
            at_most (int): the largest number that is of use.

        Returns:
            number (int or None): None if at_most values do not suffice.
        """
        deviation = self.standard_deviation
        if deviation is None:
            return None
        numbers = range(len(self.values), at_most + 1)
        return next((number for number in numbers if _half_width(deviation, number) <= half_width), None)

    @property
    def outcome(self) -> Outcome:
        """The side of zero on which the mean is; undecided where the interval holds zero."""
        low, high = self.bounds
        return "lower" if high < 0 else "higher" if low > 0 else "undecided"


def _half_width(deviation: float, number: int) -> float:
    """Return half the width of Student's interval of a mean of so many values."""
    return float(scipy.special.stdtrit(number - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(number)


def paired_difference(method: BySeed, baseline: BySeed) -> SeedInterval | None:
    """Return method minus baseline over the seeds that both have; None where they share none.

    Args:
        method (BySeed): the method's values by seed.
        baseline (BySeed): the baseline's values by seed.
    """
    seeds = sorted(set(method.keys()) & set(baseline.keys()))
    return SeedInterval(values=tuple(float(method[seed] - baseline[seed]) for seed in seeds)) if seeds else None
