"""Stochastic rounding to bf16: the documented bits, one of two neighbours, right on average, and no pattern."""

from __future__ import annotations

import struct

import pytest
import torch
from operands import randn

from tinyexperts.ops.row_adam.rounding import round_stochastically, seed_of

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 3.3895e38, -3.4028235e38, float("inf"), float("-inf")]


def by_hand(value, place, seed):
    """The bits of the rounded number, by Python's integers."""

    def mixed(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    chance = mixed(place % 2**32 ^ (place >> 32) * 0x9E3779B1 % 2**32 ^ seed) >> 16
    rounded = bits + chance
    if bits & 0x7F800000 == 0x7F800000 or rounded & 0x7F800000 == 0x7F800000:
        rounded = bits
    return rounded >> 16


@pytest.mark.parametrize("first_place", [0, 2**31 - 300, 2**32 - 300, 2**40])
def test_the_bits_are_those_that_are_documented(first_place):
    values = torch.cat([randn(500) * 10.0 ** randn(500, seed=1), torch.tensor(SPECIAL)])
    places = first_place + torch.arange(len(values))
    seed = seed_of(7, first_place)
    found = round_stochastically(values, places, seed).view(torch.uint16).tolist()
    assert found == [by_hand(*each, seed) for each in zip(values.tolist(), places.tolist(), strict=True)]


def test_what_bf16_has_stays_and_nothing_finite_overflows():
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    found = round_stochastically(every.float(), torch.arange(2**16), seed_of(1))
    assert torch.equal(found[~every.isnan()].view(torch.int16), every[~every.isnan()].view(torch.int16))
    assert found[every.isnan()].isnan().all()
    lower_bits = torch.tensor([0x7F800001, 0x7F80FFFF, 0x7FFFFFFF]).to(torch.int32).view(torch.float32)
    assert round_stochastically(lower_bits, torch.arange(3), 0).isnan().all()
    largest = torch.full((10_000,), torch.finfo(torch.float32).max)
    assert round_stochastically(largest, torch.arange(10_000), 5).isfinite().all()


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("low", [1.0, -3.0, 2.0**-130])
def test_a_number_becomes_its_neighbours_as_often_as_it_is_near(low, share):
    low, n = torch.tensor(low), 200_000
    high = (low.view(torch.int32) + (1 << 16)).view(torch.float32)
    value = (low.view(torch.int32) + round(share * 2**16)).view(torch.float32)
    found = round_stochastically(value.expand(n).contiguous(), torch.arange(n), seed_of(2)).float()
    assert set(found.tolist()) == {low.item(), high.item()}
    went_up = (found == high).float().mean().item()
    assert went_up == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)


def test_neighbours_and_steps_have_nothing_in_common():
    n = 100_000
    value = torch.full((n,), 1 + 2.0**-8)  # half way
    ups = [
        (round_stochastically(value, first + torch.arange(n), seed_of(0, parameter, step)) > 1).double() - 0.5
        for first, parameter, step in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1), (768, 0, 1), (2**32, 0, 1))
    ]
    for number, up in enumerate(ups):
        for other in ups[:number]:
            assert abs((up * other).mean().item()) < 5 * 0.25 / n**0.5


def test_seeds_differ():
    assert len(
        {seed_of(run, parameter, step) for run in range(3) for parameter in range(20) for step in range(500)}
    ) > (30_000 - 3)
    assert len({seed_of(2**32), seed_of(1), seed_of(0, 1), seed_of(1, 0), seed_of(0), seed_of(0, 0)}) == 6
    assert all(0 <= seed_of(number) < 2**32 for number in (0, 1, 2**63 - 1))
