"""The kernels that visit a token's experts: outputs and every gradient against the reference in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from operands import problem, randn

from tinyexperts.ops.expert_mlp import gpu, gpu_sums, portable, quantize_groups, quantize_vectors, reference
from tinyexperts.ops.gpu.dispatch import TOLERANCES, BeyondLimits, relative_error

KINDS = [(1, None), (2, "gelu"), (2, "relu"), (2, "relu2"), (2, "silu"), (3, "gelu"), (3, "relu2")]
# Tokens, experts, D, retrieved: one of each; odd; more retrieved than experts; whole groups of 4 bits and a short one.
SIZES = [(1, 1, 1, 1), (5, 23, 7, 6), (2, 3, 33, 9), (3, 40, 100, 5)]
STORAGES = ["float32", "bfloat16", "float16", "int8", "int4"]
# Of factors, pre-activations and gradients of the table, which are sums in fp32 of the stored numbers.
IN_FP32 = 2e-5


def run(kernel, *operands, **changes):
    """The outputs of a kernel's plan for operands, with some of its constants changed."""
    return kernel.run(replace(kernel.plan(*operands), **changes), *operands)


def stored(table, storage):
    """A table as it is stored, and its scales."""
    if storage == "int8":
        return quantize_vectors(table)
    if storage == "int4":
        return quantize_groups(table)
    return table.to(getattr(torch, storage)), None


def operands_of(num_vectors, size, storage, seed=0):
    num_tokens, num_experts, dim, retrieved = size
    sizes = {"num_tokens": num_tokens, "num_experts": num_experts, "model_dim": dim, "retrieved": retrieved}
    x, table, ids, weights = problem(num_vectors, **sizes, seed=seed)
    narrow = getattr(torch, storage) if storage.endswith("16") else torch.float32
    table, scales = stored(table, storage)
    return x.to(narrow), table, ids, weights.to(narrow), scales


def expected_results(x, table, ids, weights, scales, activation, grad_y):
    """The output, the pre-activations, and the gradients of x, weights and table, in fp64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weights)]
    wide = table.double().requires_grad_() if scales is None else table
    y, pre = reference.expert_mlp(leaves[0], wide, ids, leaves[1], activation, scales)
    leaves += [wide] if scales is None else []
    gradients = torch.autograd.grad(y, leaves, grad_y.double(), allow_unused=True, materialize_grads=True)
    return y.detach(), pre.detach(), *gradients


def check(x, table, ids, weights, scales, activation, **changes):
    """Compare the forward pass (in some splits) and the backward pass of both kernels with the reference."""
    grad_y = randn(*x.shape, seed=6).to(x.dtype)
    y, pre = run(gpu.EXPERT_MLP, x, table, ids, weights, activation, scales, **changes)
    backward = (grad_y, x, table, ids, weights, pre, activation, scales)
    grad_x, grad_weights, factors = run(gpu.EXPERT_MLP_BACKWARD, *backward)
    truth_y, truth_pre, truth_x, truth_weights, *of_table = expected_results(
        x, table, ids, weights, scales, activation, grad_y
    )
    assert (y.dtype, grad_x.dtype, grad_weights.dtype) == (x.dtype, x.dtype, weights.dtype)
    for found, truth in ((y, truth_y), (grad_x, truth_x), (grad_weights, truth_weights)):
        assert relative_error(found, truth) <= TOLERANCES[found.dtype]
    assert relative_error(pre, truth_pre) <= IN_FP32
    # The factors times what they multiply are the table's gradient.
    if of_table:
        found = portable.dense_gradient(ids, factors.double(), x.double(), grad_y.double(), table.double())
        assert relative_error(found, of_table[0]) <= IN_FP32


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("num_vectors", "activation"), KINDS)
def test_outputs_and_gradients_equal_the_reference(num_vectors, activation, storage, size):
    if size in SIZES[:2] and activation == "relu2":
        size = (size[0], size[1], 64, size[3])  # as many columns as a block has
    check(*operands_of(num_vectors, size, storage), activation)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int4"])
def test_a_token_is_split_into_several_programs(splits, storage, launched_kernels):
    # 31 experts in 8 splits: the last has three, in 3 splits of 12 the last has seven.
    operands = operands_of(2, (2, 50, 40, 31), storage)
    check(*operands, "gelu", splits=splits)
    assert launched_kernels == ["forward", "backward"]


def test_few_tokens_are_split_and_many_are_not():
    for num_tokens, splits in ((0, 32), (1, 32), (70, 16), (256, 8), (300, 4), (1025, 1), (5000, 1)):
        x, table, ids = torch.empty(num_tokens, 8), torch.empty(9, 2, 8), torch.empty(num_tokens, 128).long()
        assert gpu.EXPERT_MLP.plan(x, table, ids, ids.float(), "gelu", None).splits == splits


def test_operands_that_are_not_contiguous():
    x, table, ids, weights, scales = operands_of(3, (5, 23, 7, 6), "float32")
    spread = (x.T.contiguous().T, table, ids.T.contiguous().T, weights.T.contiguous().T, scales)
    assert not any(spread[i].is_contiguous() for i in (0, 2, 3))
    check(*spread, "silu")
    y, _ = run(gpu.EXPERT_MLP, *spread[:4], "silu", None)
    assert torch.equal(y, run(gpu.EXPERT_MLP, x, table, ids, weights, "silu", None)[0])


def test_types_may_differ():
    x, table, ids, weights, _ = operands_of(2, (3, 9, 20, 5), "float32")
    for of_x, of_table, of_weights in (("float32", "bfloat16", "float16"), ("bfloat16", "float32", "float32")):
        x, table, weights = (
            t.to(getattr(torch, dtype)) for t, dtype in ((x, of_x), (table, of_table), (weights, of_weights))
        )
        check(x, table, ids, weights, None, "gelu")


def test_one_expert_for_all_and_zero_weights():
    x, table, ids, weights, _ = operands_of(2, (4, 9, 20, 6), "float32")
    check(x, table, torch.full_like(ids, 8), weights, None, "gelu")
    check(x, table, ids, torch.zeros_like(weights), None, "relu")


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_extreme_products_stay_finite_where_the_reference_does(activation):
    x, table, ids, weights, _ = operands_of(2, (3, 9, 20, 5), "float32")
    x = x * 1e12
    y, pre = run(gpu.EXPERT_MLP, x, table, ids, weights, activation, None)
    results = (y, *run(gpu.EXPERT_MLP_BACKWARD, torch.ones_like(x), x, table, ids, weights, pre, activation, None))
    assert all(each.isfinite().all() for each in results)
    check(x, table, ids, weights, None, activation)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_reaches_its_tokens_alone(value):
    x, table, _, weights, _ = operands_of(3, (3, 9, 40, 5), "float32")
    ids = torch.arange(15).view(3, 5) % 7  # nobody retrieves 7 and 8
    table[7:] = value
    table[5, 2, 3] = value  # token 1's first expert alone: 5..9 are 5, 6, 0, 1, 2
    ids[2] = 6
    y, pre = run(gpu.EXPERT_MLP, x, table, ids, weights, "silu", None)
    assert pre.isfinite().all()
    assert not y[1, 3].isfinite()
    others = torch.ones_like(y, dtype=torch.bool)
    others[1, 3] = False
    assert y[others].isfinite().all()
    grad_x, grad_weights, _ = run(
        gpu.EXPERT_MLP_BACKWARD, torch.ones_like(x), x, table, ids, weights, pre, "silu", None
    )
    assert not grad_weights[1, 0].isfinite()
    assert grad_weights.isfinite().sum() == grad_weights.numel() - 1
    assert grad_x[[0, 2]].isfinite().all()


def test_an_infinite_token_meets_no_rows_that_are_not_there():
    x = torch.tensor([[float("inf"), 1.0, 2.0]])
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    y, _ = run(gpu.EXPERT_MLP, x, torch.ones(4, 2, 3), ids, weights, "relu", None)
    assert torch.equal(y, torch.full((1, 3), torch.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_exactly(dtype):
    table = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(128, 1, 512)
    ids = torch.arange(128)[:, None]
    y, _ = run(gpu.EXPERT_MLP, torch.zeros(128, 512), table, ids, torch.ones(128, 1), None, None)
    torch.testing.assert_close(y, table[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dim", [38, 64, 95])
def test_every_code_of_4_bits_is_read_exactly(dim):
    table = torch.stack([torch.arange(256).roll(-i) for i in range((dim + 1) // 2)], 1).to(torch.uint8).unsqueeze(1)
    scales = torch.linspace(-3, 2, 256 * ((dim + 31) // 32)).view(256, 1, -1).bfloat16()
    ids = torch.arange(256)[:, None]
    y, _ = run(gpu.EXPERT_MLP, torch.zeros(256, dim), table, ids, torch.ones(256, 1), None, scales)
    assert torch.equal(y, reference.numbers_of(table, scales, dim, torch.float32)[:, 0])


@pytest.mark.parametrize("shape", [(0, 6), (5, 0)])
def test_nothing_retrieved(shape, launched_kernels):
    x, ids, weights = torch.ones(shape[0], 7), torch.empty(shape, dtype=torch.int64), torch.empty(shape)
    y, pre = run(gpu.EXPERT_MLP, x, torch.ones(9, 2, 7), ids, weights, "gelu", None)
    assert torch.equal(y, torch.zeros_like(x))
    backward = (x, x, torch.ones(9, 2, 7), ids, weights, pre, "gelu", None)
    grad_x, grad_weights, factors = run(gpu.EXPERT_MLP_BACKWARD, *backward)
    assert torch.equal(grad_x, torch.zeros_like(x))
    assert (grad_weights.shape, factors.shape) == (shape, (2, *shape))
    assert launched_kernels == []


def test_a_table_of_more_elements_than_32_bits_count(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    num_experts, dim = 2**20 + 5, 1024  # pages that nobody touches cost nothing
    table = torch.empty(num_experts, 2, dim, dtype=torch.int8)
    scales = torch.empty(num_experts, 2)
    assert table.numel() > 2**31
    rows = torch.tensor([num_experts - 1, num_experts - 2, 2**20, 2**20 - 1, 0])
    small, small_scales = quantize_vectors(randn(5, 2, dim) / 32)
    table[rows], scales[rows] = small, small_scales
    x, weights, places = randn(2, dim, seed=1), torch.rand(2, 6), torch.arange(12).view(2, 6) % 5
    results = []
    for each_table, ids, each_scales in ((table, rows[places], scales), (small, places, small_scales)):
        y, pre = run(gpu.EXPERT_MLP, x, each_table, ids, weights, "gelu", each_scales)
        backward = (x, x, each_table, ids, weights, pre, "gelu", each_scales)
        results.append((y, pre, *run(gpu.EXPERT_MLP_BACKWARD, *backward)))
    assert all(torch.equal(found, truth) for found, truth in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 8).double()}, r"fp32, bf16 or fp16, got torch\.float64"),
        ({"weights": torch.ones(2, 3).double()}, r"got torch\.float64"),
        ({"table": torch.ones(4, 2, 8).double()}, r"int8 or 4 bits, got torch\.float64"),
        ({"x": torch.ones(2, 0), "table": torch.ones(4, 2, 0)}, "D must be between 1 and 8192, got 0"),
        ({"x": torch.ones(2, 8193), "table": torch.ones(4, 2, 8193)}, "got 8193"),
        ({"table": torch.ones(4, 8, 2).mT}, "the table must be contiguous"),
        ({"table": torch.ones(4, 2, 8).char(), "scales": torch.ones(4, 2).double()}, r"scales .* got torch\.float64"),
        ({"ids": torch.zeros(1, 1).long().expand(2**15, 2**15)}, "fewer than 1073741824, got 1073741824"),
    ],
)
def test_what_is_beyond_the_limits_is_named(change, message):
    operands = {"x": torch.ones(2, 8), "table": torch.ones(4, 2, 8), "ids": torch.zeros(2, 3).long()}
    operands |= {"weights": torch.ones(2, 3), "activation": "gelu", "scales": None} | change
    with pytest.raises(BeyondLimits, match=message):
        gpu.EXPERT_MLP.plan(*operands.values())


def test_sums_of_table_rows_by_token_and_by_row():
    table, rows, factors = randn(20, 10), torch.randint(20, (5, 7)), randn(5, 7, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        found = gpu.weighted_sum(gpu.plan_weighted_sum(5, 7, 10, dtype, dtype), table.to(dtype), rows, factors)
        truth = torch.einsum("mp,mpd->md", factors.double(), table.to(dtype)[rows].double())
        assert found.dtype == dtype
        assert relative_error(found, truth) <= TOLERANCES[dtype]
    tokens = randn(5, 10, seed=2)
    truth = (
        torch.zeros(20, 10)
        .double()
        .index_add_(0, rows.flatten(), (factors[..., None] * tokens[:, None]).double().flatten(0, 1))
    )
    assert (
        relative_error(
            gpu_sums.sum_by_row(gpu_sums.plan_sum_by_row(35, 10, tokens.dtype), rows, factors, tokens, 20), truth
        )
        <= IN_FP32
    )
