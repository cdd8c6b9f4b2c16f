"""The dense layer of equal time."""

from __future__ import annotations

import torch

from tinyexperts.bench import baselines, contestants
from tinyexperts.bench.inputs import Inputs

D, M = 16, 8


def test_the_width_of_equal_time_is_found(monkeypatch):
    class Sleeper:
        """A layer whose step takes the seconds that it is given."""

        def __init__(self, seconds):
            self.seconds = seconds

        def step_of(self, inputs):
            return lambda: (self.seconds, 0.0, 0.0)

    monkeypatch.setattr(contestants, "dense", lambda d_model, hidden_dim: Sleeper(hidden_dim / 1000))
    inputs = Inputs(M, D, trains=True, generator=torch.Generator())
    for seconds, hidden_dim in ((0.001, 16), (0.5, 512), (1.2, 1216), (1000.0, 1 << 16)):
        found = baselines._hidden_dim_of_equal_time(Sleeper(seconds), inputs)
        assert hidden_dim <= found <= 1.1 * hidden_dim
