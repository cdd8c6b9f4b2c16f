"""Learning-rate schedules at their ends and corners, by value."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tinyexperts.errors import InputError
from tinyexperts.optim import cosine, warmup_stable_decay


def test_cosine_by_value():
    values = [cosine(step, num_steps=12, warmup_steps=4, final=0.2) for step in range(13)]
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert values[8] == pytest.approx(0.6)  # half way: the mean of 1 and 0.2
    assert values[12] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(values[4:]))


def test_warmup_stable_decay_by_value():
    values = [warmup_stable_decay(step, num_steps=10, warmup_steps=2, decay_steps=4) for step in range(11)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_all_decay_is_plain_linear():
    values = [warmup_stable_decay(step, num_steps=5, warmup_steps=1, decay_steps=4) for step in range(5)]
    assert values == pytest.approx([1, 1, 0.75, 0.5, 0.25])


def test_no_warmup_and_no_decay():
    assert {warmup_stable_decay(step, num_steps=5, warmup_steps=0, decay_steps=0) for step in range(6)} == {1.0}
    assert cosine(0, num_steps=5, warmup_steps=0) == 1.0
    assert cosine(5, num_steps=5, warmup_steps=5) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine(6, num_steps=5, warmup_steps=1), "between 0 and num_steps = 5, got 6"),
        (lambda: cosine(0, num_steps=0, warmup_steps=0), "at least 1, got 0"),
        (lambda: cosine(0, num_steps=5, warmup_steps=6), "num_steps = 5, got 6"),
        (lambda: cosine(0, num_steps=5, warmup_steps=1, final=1.5), r"between 0 and 1, got 1.5"),
        (lambda: warmup_stable_decay(0, num_steps=5, warmup_steps=2, decay_steps=4), "= 3, got 4"),
    ],
)
def test_bad_input_raises(call, message):
    with pytest.raises(InputError, match=message):
        call()
