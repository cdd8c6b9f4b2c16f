"""RowSparseAdam with bf16 tables that are rounded by chance: as fp32 on average, and equal to the bit when resumed."""

from __future__ import annotations

import copy

import pytest
import torch
from operands import randn

from tinyexperts.errors import InputError
from tinyexperts.ops import expert_mlp, row_adam_
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.ops.expert_mlp.row_sums import sparse_gradient
from tinyexperts.ops.row_adam.rounding import seed_of
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients


def tables(dtype, count=1):
    """Parameters that start from the same bf16 numbers."""
    return [torch.nn.Parameter(randn(64, 2, 32, seed=number).bfloat16().to(dtype)) for number in range(count)]


def take_steps(optimizer, parameters, first, last, *, scale=1.0):
    for step in range(first, last):
        optimizer.zero_grad()
        for number, table in enumerate(parameters):
            ids = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(step))
            x, weights = randn(16, 32, seed=1000 + step), torch.ones(16, 8)
            y = expert_mlp(x.to(table.dtype), table, ids, weights, "gelu", sparse=True).float()
            (scale * (y - number) * randn(16, 32, seed=step)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_steps_that_rounding_to_the_nearest_would_lose_are_not_lost(second_moment):
    distances = {}
    truth = tables(torch.float32)
    start = truth[0].detach().clone()
    options = {"lr": 2e-4, "second_moment": second_moment}  # a number near 1 has neighbours 4e-3 to 8e-3 away
    take_steps(RowSparseAdam(truth, **options), truth, 0, 60)
    for by_chance in (True, False):
        narrow = tables(torch.bfloat16)
        take_steps(RowSparseAdam(narrow, **options, stochastic_rounding=by_chance), narrow, 0, 60)
        moved, should = (table.detach().float() - start for table in (narrow[0], truth[0]))
        distances[by_chance] = ((moved * should).sum() / should.square().sum()).item()
    assert distances[True] == pytest.approx(1, abs=0.1), "on average the way is that of fp32"
    assert distances[False] < 0.7, "and without it shorter"


def test_a_resumed_optimizer_goes_on_to_the_bit():
    whole = tables(torch.bfloat16, 2)
    take_steps(RowSparseAdam(whole, stochastic_rounding=True, rounding_seed=5), whole, 0, 6)
    parts = tables(torch.bfloat16, 2)
    first = RowSparseAdam(parts, stochastic_rounding=True, rounding_seed=5)
    take_steps(first, parts, 0, 3)
    second = RowSparseAdam(parts)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, parts, 3, 6)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_parameters_steps_and_seeds_round_apart():
    same = torch.zeros(4096, 1, 8)
    found = []
    for seed in (0, 1):
        parameters = [torch.nn.Parameter((same + 1).bfloat16()) for _ in range(2)]
        optimizer = RowSparseAdam(parameters, lr=1e-3, stochastic_rounding=True, rounding_seed=seed)
        for _ in range(2):
            for parameter in parameters:
                ones = torch.ones(4096, 1, 8).bfloat16()
                parameter.grad = sparse_gradient(torch.arange(4096), ones, parameter.shape)
            optimizer.step()
            found += [parameter.detach().clone() for parameter in parameters]
    assert all(not torch.equal(one, other) for n, one in enumerate(found) for other in found[:n])
    # Each step is one learning rate long, which is a quarter of the way to the next number.
    assert found[1].float().mean().item() == pytest.approx(1 - 1e-3, abs=1e-4)


def test_a_table_that_is_not_bf16_is_refused():
    with pytest.raises(InputError, match=r"stochastic_rounding is for bf16 tables, got one of torch\.float32"):
        RowSparseAdam(tables(torch.float32), stochastic_rounding=True)
    with pytest.raises(InputError, match="rounding_seed must not be negative, got -1"):
        RowSparseAdam(tables(torch.bfloat16), rounding_seed=-1)


def test_a_state_of_an_earlier_version_is_loaded():
    parameters = tables(torch.float32)
    optimizer = RowSparseAdam(parameters)
    take_steps(optimizer, parameters, 0, 1)
    state = optimizer.state_dict()
    for name in ("stochastic_rounding", "rounding_seed"):
        del state["param_groups"][0][name]
    optimizer = RowSparseAdam(parameters)
    optimizer.load_state_dict(state)
    take_steps(optimizer, parameters, 1, 2)
    assert optimizer.param_groups[0]["stochastic_rounding"] is False


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("by_chance", [True, False])
@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_a_fused_step_equals_one_of_the_sums_in_fp32_to_the_bit(second_moment, by_chance, max_norm):
    (table,) = tables(torch.bfloat16)
    options = {"second_moment": second_moment, "stochastic_rounding": by_chance, "rounding_seed": 3}
    optimizer = RowSparseAdam([table], lr=1e-2, weight_decay=0.1, fused=True, **options)
    ids = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(0))
    for step in (1, 2):
        optimizer.zero_grad()
        with deferred_gradients([optimizer]):
            y = expert_mlp(randn(16, 32, seed=step), table, ids, torch.ones(16, 8), "gelu", sparse=True)
            y.square().sum().backward()
        clip_gradient_norm_([table], max_norm)
        rows, values = pending_gradient(table.grad).rows_and_values()
        assert values.dtype == torch.float32
        zeros = torch.zeros(table.shape), torch.zeros(table.shape if second_moment == "element" else table.shape[:2])
        state = optimizer.state[table] or {"exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
        expected = [each.detach().clone() for each in (table, state["exp_avg"], state["exp_avg_sq"])]
        constants = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        seed = seed_of(3, 0, step) if by_chance else None
        row_adam_(*expected, rows, values, **constants, step=step, rounding_seed=seed)
        optimizer.step()
        state = optimizer.state[table]
        found = table.detach(), state["exp_avg"], state["exp_avg_sq"]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
