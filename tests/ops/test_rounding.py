"""Stochastic rounding: the neighbors of a value, each with its probability, and the same bits in all kernels."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from operands import float_patterns

from tinyexperts.ops.cpu.compile import JIT_IS_DISABLED
from tinyexperts.ops.row_adam.rounding import (
    hash_number,
    random_bits,
    round_stochastically,
    rounding_key,
    seed_of_step,
    signed,
)
from tinyexperts.ops.row_adam.rounding_cpu import key_of, narrowed, widened

PLACES = (0, 2**31 - 50, 2**32 - 50, 2**40 + 7)


def places_from(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_value_becomes_one_of_its_two_neighbors(seed: int, place: int) -> None:
    values = float_patterns()
    found = round_stochastically(values, places_from(place, len(values)), seed)
    cut = (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    finite = values.isfinite()
    next_one = (cut.view(torch.int16) + 1).view(torch.bfloat16)
    is_exact = cut.float() == values
    largest = torch.finfo(torch.bfloat16).max
    stays = (is_exact | (cut.float().abs() == largest)) & finite
    assert torch.equal(found[stays], cut[stays])
    others = finite & ~stays
    assert ((found == cut) | (found == next_one))[others].all()
    assert 0.2 < (found == cut)[others].float().mean() < 0.8
    assert torch.equal(found[values.isinf()], cut[values.isinf()])
    assert torch.equal(found.isnan(), values.isnan())
    assert found[finite].isfinite().all()


def test_the_random_bits_are_those_of_the_hash() -> None:
    elements = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 5 * 2**32 + 9, 2**45 + 2**33 + 1])
    for seed in (0, 77, 2**32 - 1):
        found = random_bits(elements, seed)
        for element, bits in zip(elements.tolist(), found.tolist(), strict=True):
            number = element % 2**32 ^ (element >> 32) * 0x9E3779B1 % 2**32 ^ rounding_key(seed)
            assert bits == hash_number(number) % 2**16
    # By the published code in C.
    assert [hash_number(number) for number in (0, 1, 0xDEADBEEF)] == [0, 1753845952, 3861431939]
    assert signed(2**32 - 1) == -1


def test_the_mean_stays_and_the_numbers_of_elements_and_steps_are_independent() -> None:
    count, steps = 4096, 200
    places = places_from(12345, count)
    values = 1 + torch.linspace(0, 1, count) / 128  # across one gap between neighbors
    found = torch.stack([round_stochastically(values, places, seed_of_step(0, 0, t)) for t in range(steps)]).double()
    error = found - values.double()
    share = (values.double() - 1) * 128
    standard_error = (share * (1 - share) / steps).sqrt() / 128
    ratio = (error.mean(0)[1:-1] / standard_error[1:-1])[share[1:-1] * (1 - share[1:-1]) > 0.02]
    assert abs(ratio.mean()) < 0.08  # normal: 0 and 1, with standard errors of 1/64 and 1/90
    assert abs(ratio.std() - 1) < 0.08
    # Of one step with the next, and of one element with its neighbor.
    unit = error / (share * (1 - share)).clamp_min(1e-3).sqrt() * 128
    unit = unit[:, 100:-100]
    for product in (unit[1:] * unit[:-1], unit[:, 1:] * unit[:, :-1]):
        assert abs(product.mean()) < 5 / product.numel() ** 0.5
    bits = torch.stack([random_bits(places, seed_of_step(0, 0, t)) for t in range(steps)])
    for number in range(16):
        assert abs((bits >> number & 1).double().mean() - 0.5) < 5 * 0.5 / bits.numel() ** 0.5


def test_seeds_of_steps_differ_by_run_table_and_step() -> None:
    seeds = {seed_of_step(seed, table, step) for seed in range(5) for table in range(5) for step in range(400)}
    assert len(seeds) == 5 * 5 * 400
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.skipif(JIT_IS_DISABLED, reason="the kernels are not compiled")
@pytest.mark.parametrize("seed", [0, 9, 2**32 - 1])
@pytest.mark.parametrize("place", PLACES)
def test_the_cpus_kernels_round_to_the_same_bits(seed: int, place: int) -> None:
    values = float_patterns()
    table = np.empty(len(values), dtype=np.uint16)
    _round_all(values.numpy(), table, place, key_of(seed))
    expected = round_stochastically(values, places_from(place, len(values)), seed)
    assert torch.equal(torch.from_numpy(table).view(torch.int16), expected.view(torch.int16))


@pytest.mark.skipif(JIT_IS_DISABLED, reason="the kernels are not compiled")
def test_the_cpus_kernels_round_to_nearest_and_widen_as_torch_does() -> None:
    values = float_patterns()
    table = np.empty(len(values), dtype=np.uint16)
    _round_all(values.numpy(), table, 0, key_of(None))
    found = torch.from_numpy(table).view(torch.bfloat16)
    torch.testing.assert_close(found, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    wide = np.empty(len(values), dtype=np.float32)
    _widen_all(table, wide)
    assert np.array_equal(wide.view(np.uint32), table.astype(np.uint32) << 16)


@numba.njit  # type: ignore[untyped-decorator]
def _round_all(values: Any, table: Any, place: int, key: Any) -> None:
    for i in range(len(values)):
        table[i] = narrowed(table, values[i], place, i, key)


@numba.njit  # type: ignore[untyped-decorator]
def _widen_all(table: Any, values: Any) -> None:
    for i in range(len(values)):
        values[i] = widened(table[i])
