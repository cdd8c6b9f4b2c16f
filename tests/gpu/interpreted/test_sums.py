"""What is summed by expert: the table's gradient, its squared norm, and Adam straight from it or from given rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from operands import float_patterns, randn

from tinyexperts.ops.expert_mlp import gpu_sums, portable
from tinyexperts.ops.expert_mlp.sorted_pairs import ids_of_pairs, places_of_rows, sort_pairs
from tinyexperts.ops.gpu.dispatch import BeyondLimits, relative_error
from tinyexperts.ops.row_adam import fused_gpu, reference
from tinyexperts.ops.row_adam import gpu as adam_gpu
from tinyexperts.ops.row_adam.rounding import round_stochastically, rounding_key, signed
from tinyexperts.ops.row_adam.triton_update import round_at_random

IN_FP32 = 2e-6
ADAM = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
CONSTANTS = (1e-2, 0.9, 0.99, 1e-8, 0.1, 3)

# How ids are drawn, with tokens, experts, D, retrieved.
PROBLEMS = {
    "one pair": (1, 1, 1, 1),
    "uniform": (5, 23, 7, 6),
    "few pairs": (2, 500, 33, 7),
    "few experts": (20, 3, 20, 8),
    "zipf": (12, 30, 40, 9),
    "nearly one expert": (30, 7, 5, 4),
    "one expert": (11, 4, 64, 6),
}


def operands_of(name, num_vectors, dtype, seed=0):
    """Ids, factors, tokens and gradients."""
    num_tokens, num_experts, dim, retrieved = PROBLEMS[name]
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (num_tokens, retrieved), generator=draw)
    if name == "zipf":
        ids = (num_experts * torch.rand(ids.shape, generator=draw) ** 6).long()
    if name.endswith("one expert"):
        share = 0.9 if name.startswith("nearly") else 1.0
        ids = torch.where(torch.rand(ids.shape, generator=draw) < share, num_experts - 1, ids)
    factors = randn(num_vectors, *ids.shape, seed=1)
    return ids, factors, randn(num_tokens, dim, seed=2).to(dtype), randn(num_tokens, dim, seed=3).to(dtype)


def truth(ids, factors, x, grad_y):
    """The touched rows and their gradients, in fp64."""
    table = torch.empty(1, len(factors), x.shape[1], dtype=torch.float64)
    return portable.gradient_rows(ids, factors.double(), x.double(), grad_y.double(), table)


each_problem = pytest.mark.parametrize("name", list(PROBLEMS))
each_tile = pytest.mark.parametrize(
    "tile", [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 7, 32]
)


@each_problem
@each_tile
@pytest.mark.parametrize("num_vectors", [1, 2, 3])
def test_gradients_equal_the_reference(num_vectors, tile, name):
    dtype = torch.bfloat16 if tile == 7 else torch.float32
    operands = operands_of(name, num_vectors, dtype)
    ids, _, x, _ = operands
    table = torch.empty(PROBLEMS[name][1], num_vectors, x.shape[1])
    rows, values = truth(*operands)
    dense = torch.zeros(table.shape, dtype=torch.float64).index_copy_(0, rows, values)
    for kernel in (gpu_sums.GRADIENT_ROWS, gpu_sums.DENSE_GRADIENT):
        plan = replace(kernel.plan(*operands, table), tile=tile)
        found = kernel.run(plan, *operands, table)
        if kernel is gpu_sums.GRADIENT_ROWS:
            assert torch.equal(found[0], rows)
            assert relative_error(found[1], values) <= IN_FP32
        else:
            assert relative_error(found, dense) <= IN_FP32
            untouched = torch.ones(len(table), dtype=torch.bool).index_fill_(0, rows, value=False)
            assert not found[untouched].any()
    plan = gpu_sums.SQUARED_NORM.plan(*sort_pairs(ids), *operands[1:])
    squares = gpu_sums.SQUARED_NORM.run(replace(plan, tile=tile), *sort_pairs(ids), *operands[1:])
    assert squares.double().sum().item() == pytest.approx(values.square().sum().item(), rel=1e-5)


def test_operands_that_are_not_contiguous():
    ids, factors, x, grad_y = operands_of("uniform", 2, torch.float32)
    spread = ids.T.contiguous().T, factors.mT.contiguous().mT, x.T.contiguous().T, grad_y.T.contiguous().T
    assert not any(operand.is_contiguous() for operand in spread)
    table = torch.empty(23, 2, 7)
    for kernel in (gpu_sums.GRADIENT_ROWS, gpu_sums.DENSE_GRADIENT):
        first, second = (
            kernel.run(kernel.plan(*operands, table), *operands, table)[-1]
            for operands in ((ids, factors, x, grad_y), spread)
        )
        assert torch.equal(first, second)
    expected = truth(ids, factors, x, grad_y)[1]
    kernel = gpu_sums.GRADIENT_ROWS
    assert relative_error(kernel.run(kernel.plan(*spread, table), *spread, table)[1], expected) <= IN_FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_table_gets_sums_that_are_rounded_once(dtype):
    ids, factors = torch.ones(1, 600, dtype=torch.int64), torch.full((1, 1, 600), 1 / 512)
    factors[0, 0, 0] = 1.0  # added one by one in bf16 or fp16, the sum would stay there
    ones, table = torch.ones(1, 1, dtype=dtype), torch.empty(2, 1, 1, dtype=dtype)
    plan = gpu_sums.DENSE_GRADIENT.plan(ids, factors, ones, ones, table)
    found = gpu_sums.DENSE_GRADIENT.run(plan, ids, factors, ones, ones, table)
    assert torch.equal(found.flatten(), torch.tensor([0, 1 + 599 / 512]).to(dtype))


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_no_pairs(num_vectors, launched_kernels):
    operands = (
        torch.empty(0, 3, dtype=torch.int64),
        torch.empty(num_vectors, 0, 3),
        torch.empty(0, 5),
        torch.empty(0, 5),
    )
    table = torch.ones(4, num_vectors, 5)
    rows, values = gpu_sums.GRADIENT_ROWS.run(gpu_sums.GRADIENT_ROWS.plan(*operands, table), *operands, table)
    assert (rows.shape, values.shape) == ((0,), (0, num_vectors, 5))
    dense = gpu_sums.DENSE_GRADIENT.run(gpu_sums.DENSE_GRADIENT.plan(*operands, table), *operands, table)
    assert torch.equal(dense, torch.zeros_like(table))
    assert launched_kernels == []


def test_pairs_are_sorted_stably_and_back():
    ids = torch.tensor([[5, 2, 2], [0, 5, 2]])
    experts, order = sort_pairs(ids)
    assert experts.tolist() == [0, 2, 2, 2, 5, 5]
    assert order.tolist() == [3, 1, 2, 5, 0, 4]
    assert places_of_rows(experts).tolist() == [0, 1, 1, 1, 2, 2]
    assert torch.equal(ids_of_pairs(experts, order, 3), ids)


def tables_of(shape, table_dtype, *, one_a_vector):
    table = randn(*shape, seed=4).to(table_dtype)
    second = randn(*(shape[:-1] if one_a_vector else shape), seed=6).square()
    return [table, randn(*shape, seed=5) / 10, second]


def check_adam(found, before, rows, grad_rows):
    """Compare a step's tables with the reference's in fp64; rows that are not touched keep their bits."""
    expected = [table.double() for table in before]
    reference.row_adam_(*expected, rows, grad_rows.double(), *CONSTANTS)
    untouched = torch.ones(len(found[0]), dtype=torch.bool).index_fill_(0, rows, value=False)
    for table, wanted, old in zip(found, expected, before, strict=True):
        assert relative_error(table, wanted) <= ADAM[table.dtype]
        assert torch.equal(table[untouched], old[untouched])
        if table.dtype == torch.float32:  # a narrow number may round to what it was
            assert not torch.equal(table[rows], old[rows])


@each_problem
@pytest.mark.parametrize("one_a_vector", [False, True])
@pytest.mark.parametrize(("num_vectors", "tile"), [(1, 32), (2, 4), (3, 7)])
def test_adam_straight_from_the_pairs(num_vectors, tile, one_a_vector, name):
    table_dtype = torch.bfloat16 if tile == 4 else torch.float32
    ids, *operands = operands_of(name, num_vectors, torch.float32)
    shape = (PROBLEMS[name][1], num_vectors, operands[1].shape[1])
    before = tables_of(shape, table_dtype, one_a_vector=one_a_vector)
    tables = [table.clone() for table in before]
    arguments = (*tables, *sort_pairs(ids), *operands, *CONSTANTS)
    plan = fused_gpu.ROW_ADAM_FUSED.plan(*arguments)
    fused_gpu.ROW_ADAM_FUSED.run(replace(plan, sums=replace(plan.sums, tile=tile)), *arguments)
    check_adam(tables, before, *truth(ids, *operands))


@pytest.mark.parametrize(
    ("shape", "one_a_vector"),
    [((9,), False), *((shape, row) for shape in ((9, 5), (9, 2, 33), (4, 2, 3, 100)) for row in (False, True))],
    ids=str,
)
@pytest.mark.parametrize("table_dtype", list(ADAM))
def test_adam_of_given_rows(table_dtype, one_a_vector, shape):
    before = tables_of(shape, table_dtype, one_a_vector=one_a_vector)
    tables = [table.clone() for table in before]
    for rows in (torch.tensor([3, 0]), torch.tensor([], dtype=torch.int64)):
        gradients = randn(len(rows), *shape[1:], seed=7).to(table_dtype)
        arguments = (*tables, rows, gradients, *CONSTANTS)
        adam_gpu.ROW_ADAM.run(adam_gpu.ROW_ADAM.plan(*arguments), *arguments)
        if len(rows):
            check_adam(tables, before, rows, gradients)


@triton.jit
def round_all(value_ptr, out_ptr, place, count, key, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(value_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr + i, round_at_random(value, i.to(tl.int64) + place, key), mask=i < count)


@pytest.mark.parametrize("seed", [0, 9, 2**32 - 1])
@pytest.mark.parametrize("place", [0, 2**31 - 50, 2**32 - 50, 2**40 + 7])
def test_values_are_rounded_at_random_to_the_bits_of_torch(place, seed):
    values = float_patterns()
    found = torch.empty(len(values), dtype=torch.bfloat16)
    round_all[(triton.cdiv(len(values), 8192),)](
        values, found, place, len(values), signed(rounding_key(seed)), BLOCK=8192
    )
    expected = round_stochastically(values, torch.arange(place, place + len(values)), seed)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@each_problem
@pytest.mark.parametrize("one_a_vector", [False, True])
@pytest.mark.parametrize(("num_vectors", "tile"), [(1, 32), (2, 4), (3, 7)])
def test_adam_rounds_a_bf16_table_by_a_seed(num_vectors, tile, one_a_vector, name):
    """Values are those of an fp32 table of the same numbers, rounded at their places; moments are the same."""
    ids, *operands = operands_of(name, num_vectors, torch.float32)
    shape = (PROBLEMS[name][1], num_vectors, operands[1].shape[1])
    before = tables_of(shape, torch.bfloat16, one_a_vector=one_a_vector)
    rows, grad_rows = truth(ids, *operands)
    places = torch.arange(before[0].numel()).view(shape)
    for kernel, gradient in (
        (fused_gpu.ROW_ADAM_FUSED, (*sort_pairs(ids), *operands)),
        (adam_gpu.ROW_ADAM, (rows, grad_rows.float())),
    ):
        wide = [table.float() for table in before]
        found = {seed: [table.clone() for table in before] for seed in (0, 2**32 - 1)}
        for tables, options in ((wide, CONSTANTS), *((found[seed], (*CONSTANTS, seed)) for seed in found)):
            plan = kernel.plan(*tables, *gradient, *options)
            if kernel is fused_gpu.ROW_ADAM_FUSED:
                plan = replace(plan, sums=replace(plan.sums, tile=tile))
            kernel.run(plan, *tables, *gradient, *options)
        for seed, (table, *moments) in found.items():
            assert torch.equal(table, round_stochastically(wide[0], places, seed))
            assert all(torch.equal(a, b) for a, b in zip(moments, wide[1:], strict=True))
        assert rows.numel() * shape[-1] < 20 or not torch.equal(found[0][0], found[2**32 - 1][0])


@pytest.mark.parametrize("kernel", [fused_gpu.ROW_ADAM_FUSED, adam_gpu.ROW_ADAM], ids=["pairs", "rows"])
def test_a_kernel_that_rounds_is_checked_as_one(kernel):
    tables = tables_of((6, 2, 33), torch.bfloat16, one_a_vector=False)
    ids, *operands = operands_of("few experts", 2, torch.float32)
    rows = (torch.tensor([1, 0]), torch.ones(2, 2, 33))
    gradient = (*sort_pairs(ids), *operands) if kernel is fused_gpu.ROW_ADAM_FUSED else rows
    plain, rounded = ((*tables, *gradient, *CONSTANTS, *seed) for seed in ((None,), (5,)))
    assert kernel.plan(*plain) != kernel.plan(*rounded)
    assert kernel.plan(*kernel.example(*rounded)) == kernel.plan(*rounded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": torch.ones(2, 1, 3).double()}, r"factors must be fp32, got torch\.float64"),
        ({"x": torch.ones(1, 8).double()}, r"fp32, bf16 or fp16, got torch\.float64"),
        ({"table": torch.ones(4, 2, 8).double()}, r"got torch\.float64"),
    ],
)
def test_sums_beyond_the_limits_are_named(change, message):
    operands = {"ids": torch.zeros(1, 3).long(), "factors": torch.ones(2, 1, 3), "x": torch.ones(1, 8)}
    operands |= {"grad_y": torch.ones(1, 8), "table": torch.ones(4, 2, 8)} | change
    with pytest.raises(BeyondLimits, match=message):
        gpu_sums.GRADIENT_ROWS.plan(*operands.values())


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 8193), torch.float32, "between 1 and 8192, got 8193"),
        ((4, 65536, 1), torch.float32, "between 1 and 65535 vectors, got 65536"),
        ((4, 2), torch.float64, "fp32, bf16 or fp16"),
    ],
)
def test_adam_beyond_the_limits_is_named(shape, dtype, message):
    tables = [torch.ones(shape, dtype=dtype) for _ in range(3)]
    with pytest.raises(BeyondLimits, match=message):
        adam_gpu.ROW_ADAM.plan(*tables, torch.tensor([0]), tables[0][:1], *CONSTANTS)
    with pytest.raises(BeyondLimits, match="must be contiguous"):
        adam_gpu.ROW_ADAM.plan(*(torch.ones(3, 4).T for _ in range(3)), torch.tensor([0]), torch.ones(1, 3), *CONSTANTS)
