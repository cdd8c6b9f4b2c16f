"""RowSparseAdam: equal to SparseAdam and to AdamW's decay, resumable, blind to untouched rows, strict about input."""

from __future__ import annotations

import copy
import itertools
import mmap
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyexperts import PEER
from tinyexperts.errors import InputError
from tinyexperts.optim import RowSparseAdam

pytestmark = pytest.mark.usefixtures("kernels")


def sparse_gradient(shape, seed, *, num_rows=5, repeated=False):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(shape[0], generator=generator)[:num_rows]
    rows = torch.cat([rows, rows[:2]]) if repeated else rows.sort().values
    values = torch.randn(len(rows), *shape[1:], generator=generator)
    return torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True)


def run(optimizer_class, *, steps=100, repeated=False, start=0, parameter=None, optimizer=None):
    if parameter is None:
        parameter = torch.nn.Parameter(torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0)))
        optimizer = optimizer_class([parameter], lr=1e-2, betas=(0.9, 0.99))
    for step in range(start, start + steps):
        parameter.grad = sparse_gradient(parameter.shape, step, repeated=repeated)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse invariant checks")  # torch's own SparseAdam triggers it
            optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("repeated", [False, True])
def test_equals_sparse_adam_over_100_steps(repeated):
    ours, _ = run(RowSparseAdam, repeated=repeated)
    theirs, _ = run(torch.optim.SparseAdam, repeated=repeated)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_untouched_rows_keep_value_and_moments():
    parameter, optimizer = run(RowSparseAdam, steps=3)
    before = {name: value.clone() for name, value in optimizer.state[parameter].items()} | {
        "value": parameter.detach().clone()
    }
    parameter.grad = sparse_gradient(parameter.shape, 7, num_rows=2)
    touched = parameter.grad._indices()[0]
    optimizer.step()
    after = optimizer.state[parameter] | {"value": parameter.detach()}
    untouched = torch.ones(12, dtype=torch.bool)
    untouched[touched] = False
    for name in ("value", "exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][untouched], before[name][untouched])
        assert not torch.equal(after[name][touched], before[name][touched])


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loaded_state_continues_bit_for_bit(dtype, second_moment):
    torch.manual_seed(0)
    layer = PEER(8, 49, num_heads=2, experts_per_head=3, query_dim=4, query_norm="none", sparse=True).to(dtype)
    optimizer = RowSparseAdam([layer.experts], lr=1e-2, weight_decay=0.5, second_moment=second_moment)

    def step(layer, optimizer, seed):
        layer.zero_grad()
        layer(
            torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
        ).float().square().sum().backward()
        optimizer.step()

    for seed in range(3):
        step(layer, optimizer, seed)
    twin = copy.deepcopy(layer)
    other = "row" if second_moment == "element" else "element"
    twin_optimizer = RowSparseAdam([twin.experts], lr=99.0, weight_decay=9.0, second_moment=other)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(layer, optimizer, seed)
        step(twin, twin_optimizer, seed)
    assert torch.equal(layer.experts, twin.experts)
    state = twin_optimizer.state[twin.experts]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.promote_types(dtype, torch.float32)
    assert state["exp_avg_sq"].shape == (layer.experts.shape if second_moment == "element" else (49, 2))
    for name, tensor in optimizer.state[layer.experts].items():
        assert torch.equal(state[name], tensor)
    (group,) = twin_optimizer.param_groups
    assert (group["weight_decay"], group["second_moment"]) == (0.5, second_moment)


def bf16_tables(count):
    return [torch.nn.Parameter(torch.ones(40, 3, 5, dtype=torch.bfloat16)) for _ in range(count)]


def give_equal_gradients(tables):
    for table in tables:
        table.grad = torch.sparse_coo_tensor(
            [[3, 8]], torch.ones(2, 3, 5).bfloat16(), table.shape, check_invariants=True
        )


def test_rounding_differs_by_seed_parameter_and_step_and_goes_on_from_a_state():
    tables = bf16_tables(4)
    groups = [{"params": tables[:2]}, {"params": tables[2:3], "seed": 8}, {"params": tables[3:]}]
    # Steps of a tenth of the distance between neighbors below 1.
    optimizer = RowSparseAdam(groups, lr=4e-4, stochastic_rounding=True, seed=7)
    rounded = {number: [] for number in range(4)}
    for step in range(6):
        give_equal_gradients(tables)
        if step == 3:
            twins = [torch.nn.Parameter(table.detach().clone()) for table in tables]
            twin_groups = [{"params": twins[:2]}, {"params": twins[2:3]}, {"params": twins[3:]}]
            twin = RowSparseAdam(twin_groups, stochastic_rounding=True)
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step >= 3:
            give_equal_gradients(twins)
            twin.step()
        optimizer.step()
        for number, table in enumerate(tables):
            rounded[number].append(table.detach().clone())
    for table, other in zip(tables, twins, strict=True):
        assert torch.equal(table, other)
    assert len({tuple(torch.cat(each).flatten().tolist()) for each in rounded.values()}) == 4
    moves = [(a - b).abs() > 0 for a, b in itertools.pairwise(rounded[0])]
    assert not torch.equal(moves[0], moves[1])
    # Rounded to nearest no step moves anything.
    (plain,) = bf16_tables(1)
    optimizer = RowSparseAdam([plain], lr=4e-4)
    give_equal_gradients([plain])
    optimizer.step()
    assert (plain == 1).all()


def test_a_state_from_before_the_options_of_rounding_is_loaded():
    (table,) = bf16_tables(1)
    state = RowSparseAdam([table]).state_dict()
    del state["param_groups"][0]["stochastic_rounding"], state["param_groups"][0]["seed"]
    optimizer = RowSparseAdam([table], stochastic_rounding=True, seed=3)
    optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["stochastic_rounding"], optimizer.param_groups[0]["seed"]) == (False, 0)


def test_groups_have_rates_of_their_own():
    parameters = [torch.nn.Parameter(torch.zeros(6, 2)) for _ in range(2)]
    optimizer = RowSparseAdam([{"params": [parameters[0]], "lr": 0.5}, {"params": [parameters[1]]}], lr=0.25)
    for parameter in parameters:
        parameter.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 2), (6, 2), check_invariants=True)
    optimizer.step()
    # The first step of Adam is one learning rate long.
    torch.testing.assert_close(parameters[0][3], torch.full((2,), -0.5))
    torch.testing.assert_close(parameters[1][3], torch.full((2,), -0.25))


def test_no_gradient_and_an_empty_gradient_change_nothing():
    parameter = torch.nn.Parameter(torch.ones(6, 2))
    optimizer = RowSparseAdam([parameter])
    optimizer.step()
    parameter.grad = torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 2), (6, 2), check_invariants=True
    )
    optimizer.step()
    assert torch.equal(parameter, torch.ones(6, 2))


def test_closure_is_called_with_gradients_enabled():
    parameter = torch.nn.Parameter(torch.ones(6, 2))
    optimizer = RowSparseAdam([parameter])

    def closure():
        assert torch.is_grad_enabled()
        return 3.0

    assert optimizer.step(closure) == 3.0


def test_bad_input_raises():
    parameter = torch.nn.Parameter(torch.ones(6, 2))
    for options, message in (
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"weight_decay": -0.5}, "weight_decay must not be negative, got -0.5"),
        ({"second_moment": "column"}, 'second_moment must be "element" or "row", got \'column\''),
        ({"second_moment": None}, "got None"),
        ({"seed": -1}, r"seed must be at least 0 and less than 2\^32, got -1"),
        ({"stochastic_rounding": True}, r"stochastic_rounding is for bf16 tables, got one of torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            RowSparseAdam([parameter], **options)
    optimizer = RowSparseAdam([parameter])
    parameter.grad = torch.ones(6, 2)
    with pytest.raises(InputError, match=r"got a dense one of shape \[6, 2\]: use AdamW, or make the layer with PEER"):
        optimizer.step()
    flat = torch.nn.Parameter(torch.ones(6))
    flat.grad = torch.sparse_coo_tensor([[1]], torch.ones(1), (6,), check_invariants=True)
    with pytest.raises(InputError, match=r"of at least two dimensions, got \[6\]"):
        RowSparseAdam([flat], second_moment="row").step()


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident memory from /proc")
def test_the_state_takes_memory_only_for_touched_rows(second_moment):
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    table = torch.nn.Parameter(torch.from_numpy(np.zeros((2**19, 2, 128), dtype=np.float32)))  # 512 MiB, untouched
    optimizer = RowSparseAdam([table], second_moment=second_moment)
    rows = torch.arange(0, 2**19, 2**17)
    table.grad = torch.sparse_coo_tensor(rows[None], torch.ones(4, 2, 128), table.shape, check_invariants=True)
    before = resident_bytes()
    optimizer.step()
    # A touched row may bring in a huge page of 2 MiB in each of the three tables.
    assert resident_bytes() - before < 64 * 2**20
    assert (table[rows] < 0).all()


def test_groups_have_betas_and_eps_of_their_own():
    options = [{"betas": (0.5, 0.9), "eps": 1.0}, {"betas": (0.8, 0.6), "eps": 1e-3}, {}]
    defaults = {"lr": 0.25, "betas": (0.3, 0.7), "eps": 0.1}
    parameters = [torch.nn.Parameter(torch.zeros(6, 2)) for _ in options]
    groups = [{"params": [p], **each} for p, each in zip(parameters, options, strict=True)]
    ours = RowSparseAdam(groups, **defaults)
    for seed in range(3):
        for parameter in parameters:
            parameter.grad = sparse_gradient(parameter.shape, seed)
        ours.step()
    for parameter, each in zip(parameters, options, strict=True):
        expected = torch.nn.Parameter(torch.zeros(6, 2))
        theirs = torch.optim.SparseAdam([expected], **(defaults | each))
        for seed in range(3):
            expected.grad = sparse_gradient(expected.shape, seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse invariant checks")
                theirs.step()
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)


def row_formula(value, gradients, *, lr, betas, eps, weight_decay):
    """Values and second moments after Adam with one second moment a vector; rows and gradients [R, ..., D] a step."""
    value, first, second = value.clone(), torch.zeros_like(value), value.new_zeros(value.shape[:-1])
    for step, (rows, grad) in enumerate(gradients, start=1):
        first[rows] = betas[0] * first[rows] + (1 - betas[0]) * grad
        second[rows] = betas[1] * second[rows] + (1 - betas[1]) * (grad**2).sum(-1) / grad.shape[-1]
        corrected = first[rows] / (1 - betas[0] ** step)
        root = (second[rows].sqrt() + eps) / (1 - betas[1] ** step) ** 0.5
        value[rows] = value[rows] * (1 - lr * weight_decay) - lr * corrected / root[..., None]
    return value, second


@pytest.mark.parametrize("shape", [(12, 3), (12, 2, 5), (12, 3, 2, 70)])
def test_one_second_moment_a_vector_equals_the_formula_over_100_steps(shape):
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.2}
    # fp64: in fp32 the factor 1 - lr * weight_decay alone is off by 2e-6 after 40 steps of a row.
    parameter = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).double())
    start = parameter.detach().clone()
    optimizer = RowSparseAdam([parameter], second_moment="row", **options)
    gradients = []
    for step in range(100):
        parameter.grad = sparse_gradient(shape, step).double()
        gradients.append((parameter.grad._indices()[0], parameter.grad._values()))
        optimizer.step()
    value, second = row_formula(start, gradients, **options)
    torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-12)
    assert optimizer.state[parameter]["exp_avg_sq"].shape == shape[:-1]
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], second, rtol=1e-12, atol=1e-12)


def test_weight_decay_equals_adamw_where_every_row_is_touched():
    start = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # eps = 0: AdamW adds it after the bias correction, SparseAdam before.
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.5}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = RowSparseAdam([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(100):
        ours.grad = sparse_gradient((12, 2, 3), step, num_rows=12).double()
        theirs.grad = ours.grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_touched_do_not_decay():
    parameter = torch.nn.Parameter(torch.ones(6, 2))
    parameter.grad = torch.sparse_coo_tensor([[3]], torch.zeros(1, 2), (6, 2), check_invariants=True)
    RowSparseAdam([parameter], lr=0.5, weight_decay=0.25).step()
    expected = torch.ones(6, 2)
    expected[3] = 1 - 0.5 * 0.25
    assert torch.equal(parameter.detach(), expected)


def test_groups_have_a_weight_decay_and_a_second_moment_of_their_own():
    groups = [{"weight_decay": 0.3}, {"second_moment": "row"}, {}]
    parameters = [torch.nn.Parameter(torch.ones(6, 2)) for _ in groups]
    optimizer = RowSparseAdam(
        [{"params": [p], **group} for p, group in zip(parameters, groups, strict=True)], lr=0.5, weight_decay=0.1
    )
    for parameter in parameters:
        parameter.grad = torch.sparse_coo_tensor([[3]], torch.tensor([[3.0, 4.0]]), (6, 2), check_invariants=True)
    optimizer.step()
    # The first step of Adam: the learning rate times the gradient over the root of its square, or of the mean square.
    by_vector = 0.5 * torch.tensor([3.0, 4.0]) / 12.5**0.5
    for parameter, expected in zip(parameters, (0.85 - 0.5, 0.95 - by_vector, 0.95 - 0.5), strict=True):
        torch.testing.assert_close(parameter.detach()[3], torch.as_tensor(expected).expand(2))
    shapes = [tuple(optimizer.state[parameter]["exp_avg_sq"].shape) for parameter in parameters]
    assert shapes == [(6, 2), (6,), (6, 2)]
