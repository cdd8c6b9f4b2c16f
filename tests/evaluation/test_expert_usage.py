"""Expert usage as the paper defines it, on cases worked out by hand, and recorded from a layer."""

from __future__ import annotations

import math

import pytest
import torch

from tinyexperts import PEER
from tinyexperts.evaluation import expert_usage, recorded_expert_usage


def test_even_use():
    usage = expert_usage(torch.full((8,), 3.0, dtype=torch.float64))
    assert (usage.usage, usage.num_dead) == (1.0, 0)
    assert usage.unevenness == pytest.approx(0, abs=1e-12)
    assert usage.gini == pytest.approx(0, abs=1e-12)


def test_one_expert_alone():
    usage = expert_usage(torch.tensor([0.0, 5.0, 0.0, 0.0], dtype=torch.float64))
    assert (usage.usage, usage.num_dead) == (0.25, 3)
    assert usage.unevenness == pytest.approx(math.log(4))
    assert usage.gini == pytest.approx(0.75)


def test_a_case_by_hand():
    usage = expert_usage(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert usage.share.tolist() == [0.25, 0.75]
    assert usage.unevenness == pytest.approx(math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    # half the mean absolute difference over the mean: |0.25 - 0.75| / 2 / (2 * 0.5)
    assert usage.gini == pytest.approx(0.25)


def test_no_weight_at_all():
    usage = expert_usage(torch.zeros(4, dtype=torch.float64))
    assert (usage.usage, usage.num_dead) == (0.0, 4)


def test_recording_sums_the_router_weights_of_every_batch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(PEER(8, 25, num_heads=2, experts_per_head=3, query_dim=4), torch.nn.Linear(8, 8)).eval()
    batches = torch.randn(3, 7, 8)
    with recorded_expert_usage(model) as sums:
        for batch in batches:
            model(batch)
    expected = torch.zeros(25, dtype=torch.float64)
    for batch in batches:
        routing = model[0].route(batch)
        for expert, weight in zip(routing.ids.flatten().tolist(), routing.weights.flatten().tolist(), strict=True):
            expected[expert] += weight
    torch.testing.assert_close(sums["0"], expected)
    torch.testing.assert_close(sums["0"].sum(), torch.tensor(3 * 7 * 2.0, dtype=torch.float64))
    model(batches[0])
    torch.testing.assert_close(sums["0"], expected)  # closed: nothing more is recorded
