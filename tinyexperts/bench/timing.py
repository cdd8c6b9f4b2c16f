"""Interleaved timing: a, b, a, b, ... so that the machine's other work affects all alike, and ratios round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# A sample of something short is the mean of several calls, which take about this long together.
_SAMPLE_SECONDS = 0.02
_MAX_CALLS = 200


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of repeated measurements, and the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """Return the spread of the values of an array."""
        lower, median, upper = (float(value) for value in np.percentile(values, (25, 50, 75)))
        return cls(median=median, lower_quartile=lower, upper_quartile=upper)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The seconds of a training step's phases, and of the whole step."""

    forward_seconds: Spread
    backward_seconds: Spread
    update_seconds: Spread
    step_seconds: Spread

    @classmethod
    def of(cls, seconds: np.ndarray) -> StepTimes:
        """Return the times of steps from the seconds of their phases, [repeats, 3]."""
        forward, backward, update, step = map(Spread.of, (*seconds.T, seconds.sum(1)))
        return cls(forward_seconds=forward, backward_seconds=backward, update_seconds=update, step_seconds=step)


def timed(function: Callable[[], object]) -> Callable[[], tuple[float]]:
    """Return a call of `function` for `interleaved`; its result is freed after the clock has stopped."""

    def call() -> tuple[float]:
        started = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - started
        del result
        return (seconds,)

    return call


def timed_after(prepare: Callable[[], Any], function: Callable[[Any], object]) -> Callable[[], tuple[float]]:
    """Return a call that prepares first and then times `function` alone, on the result of `prepare`."""

    def call() -> tuple[float]:
        prepared = prepare()
        return timed(lambda: function(prepared))()

    return call


def interleaved(calls: Mapping[str, Callable[[], Sequence[float]]], repeats: int) -> dict[str, np.ndarray]:
    """Time calls in rounds that measure each of them once, after two calls to warm up.

    Args:
        calls (Mapping[str, Callable]): each times its own phases and returns their seconds.
        repeats (int): number of rounds.

    Returns:
        The seconds of each call, [repeats, phases].
    """
    num_calls = {}
    for name, call in calls.items():
        call()
        seconds = sum(call())
        num_calls[name] = min(_MAX_CALLS, max(1, round(_SAMPLE_SECONDS / max(seconds, 1e-9))))
    samples: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(np.mean([call() for _ in range(num_calls[name])], axis=0))
    return {name: np.array(rounds) for name, rounds in samples.items()}


def billions_per_second(amount: float, seconds: np.ndarray) -> float:
    """Return a rate in 1e9 a second, by the median of the seconds."""
    return amount / float(np.median(seconds)) / 1e9
