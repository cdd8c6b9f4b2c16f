"""Calls take turns, and only what is to be timed is."""

from __future__ import annotations

import numpy as np
import pytest

from tinyexperts.bench import timing
from tinyexperts.bench.timing import Spread, StepTimes, interleaved, timed_after


def test_calls_take_turns_and_short_ones_are_repeated(monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.018)
    order = []

    def call(name: str, seconds: float):
        def run():
            order.append(name)
            return seconds, 2 * seconds

        return run

    times = interleaved({"a": call("a", 1.0), "b": call("b", 0.002)}, repeats=3)
    assert "".join(order) == "aabb" + 3 * ("a" + 3 * "b")
    assert times["a"].tolist() == 3 * [[1.0, 2.0]]
    assert times["b"] == pytest.approx(np.full((3, 2), (0.002, 0.004)))
    spread = Spread.of(np.array([1.0, 5.0, 2.0, 3.0, 4.0]))
    assert (spread.lower_quartile, spread.median, spread.upper_quartile) == (2, 3, 4)


def test_prepared_calls_leave_the_preparation_out_of_the_clock(monkeypatch):
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    order = []
    call = timed_after(lambda: order.append("prepared") or 7, lambda value: order.append(value))
    assert call() == (2.5,)
    assert order == ["prepared", 7]


def test_the_phases_of_a_step_keep_their_order():
    times = StepTimes.of(np.array(3 * [[1.0, 2.0, 4.0]]))
    medians = [
        each.median
        for each in (times.forward_seconds, times.backward_seconds, times.update_seconds, times.step_seconds)
    ]
    assert medians == [1, 2, 4, 7]
