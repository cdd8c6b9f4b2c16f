"""Interleaved timing: a, b, a, b, ... so that what else the machine does meets all alike, and ratios round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# A sample of something short is the mean of several calls, which take about so long together.
_SAMPLE_SECONDS = 0.02
_MAX_CALLS = 200


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of repeated measurements, and between which values the middle half of them lies."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        lower, median, upper = (float(value) for value in np.percentile(values, (25, 50, 75)))
        return cls(median=median, lower_quartile=lower, upper_quartile=upper)


def spread(values: np.ndarray) -> dict[str, float]:
    """`Spread` as JSON wants it."""
    return asdict(Spread.of(values))


def phases_of_step(seconds: np.ndarray) -> dict[str, dict[str, float]]:
    """The spread of a training step's seconds and of its phases', from [repeats, 3]."""
    names = ("forward_seconds", "backward_seconds", "update_seconds")
    phases = {name: spread(column) for name, column in zip(names, seconds.T, strict=True)}
    return {**phases, "step_seconds": spread(seconds.sum(1))}


def timed(function: Callable[[], object]) -> Callable[[], tuple[float]]:
    """A call of `function` as `interleaved` wants it; what it returns is freed after the clock has stopped."""

    def call() -> tuple[float]:
        started = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - started
        del result
        return (seconds,)

    return call


def timed_after(prepare: Callable[[], Any], function: Callable[[Any], object]) -> Callable[[], tuple[float]]:
    """As `timed`, of `function` alone, which is given what `prepare` returned before the clock was started."""

    def call() -> tuple[float]:
        prepared = prepare()
        return timed(lambda: function(prepared))()

    return call


def interleaved(calls: Mapping[str, Callable[[], Sequence[float]]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each call, [repeats, phases], in rounds that measure each of them once, after two calls to warm up.

    calls: each times its own phases and returns their seconds
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
