"""Retrieval by Triton's kernels: to the bit on given scores, ties and all; the operator and its gradients by value."""

from __future__ import annotations

import pytest
import torch
import triton

from tinyexperts.ops.gpu.dispatch import BeyondLimits, on_gpu
from tinyexperts.ops.product_key_topk import gpu, portable, reference
from tinyexperts.ops.product_key_topk.triton_pairs import pairs
from tinyexperts.ops.product_key_topk.triton_select import select

_PLACE = "tinyexperts.ops.product_key_topk.gpu"
KINDS = [
    "normal",
    "few levels",
    "all equal",
    "zeros of both signs",
    "ascending",
    "best side by side",
    "best in one column",
    "a few tie",
    "swallowed",
    "huge and tiny",
    "infinite",
    "not a number",
]
WITHOUT_ORDER = ("infinite", "not a number")


def rows_of(kind: str, num_rows: int, num_sub_keys: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * num_sub_keys + seed)
    rows = torch.randn(num_rows, num_sub_keys, generator=generator)
    chance = torch.rand(num_rows, num_sub_keys, generator=generator)
    position = torch.arange(num_sub_keys)
    if kind == "few levels":
        return rows.mul(2).round()
    if kind == "all equal":
        return torch.full_like(rows, -1.5)
    if kind == "zeros of both signs":
        return torch.where(chance < 0.5, -0.0, 0.0)
    if kind == "ascending":
        return position.float().expand(num_rows, -1).contiguous()
    if kind == "best side by side":
        return rows + 10 * (position < num_sub_keys // 8)
    if kind == "best in one column":
        return rows + 10 * (position % 128 == 5)
    if kind == "a few tie":  # more than a program has slots for
        return torch.where(position % max(1, num_sub_keys // 40) == 0, 9.0, rows) + 10 * (position > num_sub_keys - 4)
    if kind == "swallowed":  # sums round to the huge ones, which tie then
        rows[:, [num_sub_keys // 3, num_sub_keys // 2]] = 1e30
    if kind == "huge and tiny":
        return rows * 10.0 ** torch.randint(-40, 38, rows.shape, generator=generator)
    if kind in WITHOUT_ORDER:
        rows[chance < 0.3] = -torch.inf
        rows[chance > 0.9] = torch.inf
    if kind == "not a number":
        rows[chance > 0.95] = torch.nan
        rows[0] = torch.nan
    return rows


def same_numbers(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(
        found.nan_to_num(1.25e30, torch.inf, -torch.inf), expected.nan_to_num(1.25e30, torch.inf, -torch.inf)
    )


def plan_of(num_sub_keys: int, k: int) -> gpu.TopKPlan:
    plan = gpu.PRODUCT_KEY_TOPK.plan(torch.empty(1, 1, 2), torch.empty(2, num_sub_keys, 1), k)
    assert isinstance(plan, gpu.TopKPlan)
    return plan


def best_of(rows: torch.Tensor, plan: gpu.TopKPlan) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.empty(len(rows), plan.num_best)
    index, slots = (torch.empty(len(rows), size, dtype=torch.int32) for size in (plan.num_best, plan.slots))
    constants = (plan.in_fours, plan.num_best, plan.fours, plan.slots)
    select[(len(rows),)](rows, best, index, slots, rows.shape[1], *constants, num_warps=1)
    return best, index


def check_best_of(rows: torch.Tensor, k: int) -> None:
    plan = plan_of(rows.shape[1], k)
    best, index = best_of(rows, plan)
    expected = rows.sort(dim=1, descending=True, stable=True)
    assert torch.equal(index, expected.indices[:, : plan.num_best].int())
    assert same_numbers(best, expected.values[:, : plan.num_best])


def check_top_k_of_sums(rows_1: torch.Tensor, rows_2: torch.Tensor, k: int, *, in_order: bool) -> None:
    """Sorted rows stand for what `select` gives, so that this checks `pairs` alone."""
    num_sub_keys = rows_1.shape[1]
    plan = plan_of(num_sub_keys, k)
    scores = torch.stack([rows_1, rows_2])
    by_score = scores.sort(dim=2, descending=True, stable=True)
    best = by_score.values[:, :, : plan.num_best].contiguous()
    index = by_score.indices[:, :, : plan.num_best].int().contiguous()
    out_scores, out_ids = torch.empty(len(rows_1), k), torch.empty(len(rows_1), k, dtype=torch.int64)
    constants = (plan.num_candidates, plan.num_frontier, plan.candidates, plan.compared, plan.frontier, plan.ties_block)
    places = gpu._places(k, plan.num_best, scores.device)
    pairs[(len(rows_1),)](
        scores, best, index, *places, out_scores, out_ids, num_sub_keys, k, plan.num_best, *constants, num_warps=1
    )
    if in_order:
        sums = (rows_1.unsqueeze(2) + rows_2.unsqueeze(1)).flatten(1)
        expected = sums.sort(dim=1, descending=True, stable=True)
        assert torch.equal(out_ids, expected.indices[:, :k])
        assert torch.equal(out_scores, expected.values[:, :k])
    else:  # infinity minus infinity is NaN, which has no place in the order: the candidates decide, as in portable.py
        expected_scores, _ = portable._top_k_of_sums(rows_1, rows_2, k)
        assert same_numbers(out_scores, expected_scores)
        sums = rows_1.gather(1, out_ids // num_sub_keys) + rows_2.gather(1, out_ids % num_sub_keys)
        assert same_numbers(sums, out_scores)
        assert all(len(ids.unique()) == k for ids in out_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_sub_keys", "k"), [(1, 1), (2, 1), (3, 3), (9, 4), (17, 16), (33, 32)])
def test_the_best_of_a_short_row(num_sub_keys, k, kind):
    check_best_of(rows_of(kind, 1, num_sub_keys), k)


@pytest.mark.parametrize(
    ("num_sub_keys", "k", "kind"),
    [
        *((100, 16, kind) for kind in ("few levels", "best side by side")),
        *((1000, 16, kind) for kind in ("normal", "all equal", "best in one column", "a few tie", "not a number")),
        *((1000, 32, kind) for kind in ("normal", "few levels")),
    ],
)
def test_the_best_of_a_long_row(num_sub_keys, k, kind):
    check_best_of(rows_of(kind, 1, num_sub_keys), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_sub_keys", "k"), [(1, 1), (2, 2), (9, 4), (17, 16)])
def test_the_top_k_of_the_sums(num_sub_keys, k, kind):
    rows_1, rows_2 = (rows_of(kind, 2, num_sub_keys, seed) for seed in (1, 2))
    check_top_k_of_sums(rows_1, rows_2, k, in_order=kind not in WITHOUT_ORDER)


@pytest.mark.parametrize("kind", ["normal", "few levels", "all equal", "swallowed"])
@pytest.mark.parametrize("k", [1, 32])
def test_the_top_k_of_the_sums_of_long_rows(k, kind):
    check_top_k_of_sums(rows_of(kind, 1, 150, 1), rows_of("normal", 1, 150, 2), k, in_order=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_sub_keys", [31, 64, 100, 128, 129, 513, 1000, 1024, 2048])
def test_the_best_of_rows_of_all_kinds(num_sub_keys, kind):
    for k in (1, 4, 16, 32):
        if k <= num_sub_keys:
            check_best_of(rows_of(kind, 2, num_sub_keys), k)


@pytest.mark.slow
@pytest.mark.parametrize("kind_2", KINDS)
@pytest.mark.parametrize("kind_1", KINDS)
def test_the_top_k_of_the_sums_of_all_kinds(kind_1, kind_2):
    in_order = not {kind_1, kind_2} & set(WITHOUT_ORDER)
    for num_sub_keys, k in ((3, 2), (33, 32), (33, 4), (100, 19), (128, 20)):
        rows = rows_of(kind_1, 2, num_sub_keys, 1), rows_of(kind_2, 2, num_sub_keys, 2)
        check_top_k_of_sums(*rows, k, in_order=in_order)


def operands(dtype: torch.dtype, *, shared: bool, num_sub_keys: int = 12, half: int = 3):
    """Queries and sub-keys whose products are exact: eighths, and a query of zeros."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 2, 2 * half, generator=generator).mul(8).round().div(8)
    query[1, 0] = 0
    shape = (2, num_sub_keys, half) if shared else (2, 2, num_sub_keys, half)
    keys = torch.randn(shape, generator=generator).mul(8).round().div(8)
    return query.to(dtype), keys.to(dtype)


@pytest.fixture
def product_key_topk(triton_is_allowed):
    return on_gpu(f"{_PLACE}:PRODUCT_KEY_TOPK", portable.product_key_topk)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("elements", [1 << 23, 100])
def test_the_operator_equals_brute_force(monkeypatch, product_key_topk, launched_kernels, shared, elements):
    monkeypatch.setattr(gpu, "_CHUNK_ELEMENTS", elements)
    query, keys = operands(torch.float32, shared=shared)
    scores, ids = product_key_topk(query, keys, 5)
    assert launched_kernels[-2:] == ["select", "pairs"]
    expected_scores, expected_ids = reference.product_key_topk(query, keys, 5)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_narrow_operands_are_those_of_fp32(product_key_topk, dtype):
    query, keys = operands(dtype, shared=True)
    scores, ids = product_key_topk(query, keys, 5)
    expected_scores, expected_ids = reference.product_key_topk(query.float(), keys.float(), 5)
    assert scores.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


def test_operands_that_are_parts_of_others(product_key_topk):
    query, keys = operands(torch.float32, shared=False)
    wide_query, wide_keys = (torch.full((*each.shape, 2), torch.nan) for each in (query, keys))
    wide_query[..., 1], wide_keys[..., 1] = query, keys
    scores, ids = product_key_topk(wide_query[..., 1], wide_keys[..., 1], 5)
    expected_scores, expected_ids = reference.product_key_topk(query, keys, 5)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_those_of_plain_autograd(triton_is_allowed, launched_kernels, dtype, shared):
    query, keys = operands(dtype, shared=shared)
    leaves = [each.double().requires_grad_() for each in (query, keys)]
    scores, ids = reference.product_key_topk(*leaves, 5)
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(4))
    scores.backward(grad)
    backward = on_gpu(f"{_PLACE}:PRODUCT_KEY_TOPK_BACKWARD", portable.product_key_topk_backward)
    grads = backward(grad, ids, query, keys)
    assert launched_kernels
    again = backward(grad, ids, query, keys)
    for found, repeated, leaf, operand in zip(grads, again, leaves, (query, keys), strict=True):
        assert found.dtype == dtype
        assert found.shape == operand.shape
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
        assert (found.double() - leaf.grad).norm() <= tolerance * leaf.grad.norm()
        assert torch.equal(found, repeated)


def test_a_gradient_that_is_one_number_seen_everywhere(triton_is_allowed):
    """scores.sum().backward() gives a tensor of strides 0."""
    query, keys = operands(torch.float32, shared=True)
    _, ids = reference.product_key_topk(query, keys, 5)
    backward = on_gpu(f"{_PLACE}:PRODUCT_KEY_TOPK_BACKWARD", portable.product_key_topk_backward)
    grad = torch.ones(()).expand(ids.shape)
    torch.testing.assert_close(
        backward(grad, ids, query, keys), portable.product_key_topk_backward(grad, ids, query, keys)
    )


def test_the_check_runs_on_operands_with_few_and_with_many_ties():
    query, keys = torch.randn(50, 2, 64).bfloat16(), torch.randn(2, 40, 32)
    example_query, example_keys, k = gpu.PRODUCT_KEY_TOPK.example(query, keys, 4)
    assert (example_query.dtype, example_keys.dtype, k) == (torch.bfloat16, torch.float32, 4)
    assert gpu.PRODUCT_KEY_TOPK.plan(example_query, example_keys, k) == gpu.PRODUCT_KEY_TOPK.plan(query, keys, 4)
    scores = torch.cat(portable.half_scores(example_query, example_keys), -1)[:, 0]
    assert torch.equal(scores, scores.round())
    # Of 80 scores: few tie, many, all.
    few, many, all_of_them = (80 - len(row.unique()) for row in scores)
    assert few < 15 < 25 < many < all_of_them == 79
    ids, grad = torch.randint(0, 1600, (50, 2, 4)), torch.randn(50, 2, 4)
    arguments = (grad, ids, query, keys)
    example = gpu.PRODUCT_KEY_TOPK_BACKWARD.example(*arguments)
    assert [each.dtype for each in example] == [each.dtype for each in arguments]
    assert [each.shape[1:] for each in example] == [each.shape[1:] for each in arguments]


@pytest.mark.parametrize("num_tokens", [1, 2**18])
def test_the_check_of_the_gradients_runs_the_kernels_of_a_batch_of_any_size(num_tokens):
    """Small and large batches have other kernels; the plan says which, and the check runs them on few tokens."""
    query, keys = torch.empty(1).expand(num_tokens, 2, 6), torch.empty(2, 9, 3)
    ids = torch.empty(1, dtype=torch.int64).expand(num_tokens, 2, 8)
    arguments = (torch.empty(1).expand(ids.shape), ids, query, keys)
    plan = gpu.PRODUCT_KEY_TOPK_BACKWARD.plan(*arguments)
    assert (plan.grad_query.splits, plan.grad_keys.tile) == ((2, 32) if num_tokens == 1 else (1, 128))
    example = gpu.PRODUCT_KEY_TOPK_BACKWARD.example(*arguments)
    found = gpu.PRODUCT_KEY_TOPK_BACKWARD.run(plan, *example)
    torch.testing.assert_close(found, portable.product_key_topk_backward(*example))


def test_sub_keys_that_are_wider_than_the_kernels_of_the_gradients_take():
    query, keys, ids = torch.empty(3, 1, 16386), torch.empty(2, 9, 8193), torch.zeros(3, 1, 4, dtype=torch.int64)
    gpu.PRODUCT_KEY_TOPK.plan(query, keys, 4)
    with pytest.raises(BeyondLimits, match="between 1 and 8192, got 8193"):
        gpu.PRODUCT_KEY_TOPK_BACKWARD.plan(torch.empty(3, 1, 4), ids, query, keys)


@pytest.mark.parametrize(
    ("query", "keys", "k", "message"),
    [
        (
            torch.empty(3, 1, 2, dtype=torch.float64),
            torch.empty(2, 9, 1),
            4,
            "take fp32, bf16 and fp16, got torch.float64",
        ),
        (torch.empty(3, 1, 2), torch.empty(2, 9, 1, dtype=torch.float64), 4, "got torch.float64"),
        (torch.empty(3, 1, 2, dtype=torch.int64), torch.empty(2, 9, 1), 4, "got torch.int64"),
        (torch.empty(3, 1, 2), torch.empty(2, 64, 1), 33, "up to 32 experts for a query, got k = 33"),
        (torch.empty(0, 1, 2), torch.empty(2, 9, 1), 4, r"no empty operands, got queries \[0, 1, 2\]"),
        (torch.empty(3, 0, 2), torch.empty(2, 9, 1), 4, r"got queries \[3, 0, 2\]"),
        (torch.empty(3, 1, 0), torch.empty(2, 9, 0), 4, r"got queries \[3, 1, 0\]"),
        (torch.empty(3, 1, 2), torch.empty(1).expand(2, 46341, 1), 4, r"must fit 32 bits, got 46341\^2 experts"),
        (torch.empty(1).expand(2**28, 1, 2), torch.empty(2, 9, 1), 4, "got 268435456 queries and k = 4"),
    ],
)
def test_operands_beyond_the_limits(query, keys, k, message):
    with pytest.raises(BeyondLimits, match=message):
        gpu.PRODUCT_KEY_TOPK.plan(query, keys, k)
    ids = torch.empty(1, dtype=torch.int64).expand(*query.shape[:2], k)
    with pytest.raises(BeyondLimits, match=message):
        gpu.PRODUCT_KEY_TOPK_BACKWARD.plan(torch.empty(1).expand(ids.shape), ids, query, keys)


def test_the_largest_sizes_within_the_limits():
    keys = torch.empty(1).expand(2, 46340, 1)
    assert plan_of(46340, 32).num_candidates == 119
    gpu.PRODUCT_KEY_TOPK.plan(torch.empty(1).expand(2**25 - 1, 1, 2), keys, 32)
    assert triton.next_power_of_2(119) == 128 == plan_of(46340, 32).candidates
    assert all(plan_of(40, k).compared * plan_of(40, k).candidates <= 4096 for k in range(1, 33))


def test_ids_near_the_limit_of_32_bits_are_right():
    rows = torch.randn(2, 1, 46340, generator=torch.Generator().manual_seed(5))
    rows[:, 0, -2:] = torch.tensor([10.0, 11.0])
    check = plan_of(46340, 2)
    best, index = rows.sort(dim=2, descending=True, stable=True)
    best, index = best[:, :, :3].contiguous(), index[:, :, :3].int().contiguous()
    scores, ids = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int64)
    constants = (check.num_candidates, check.num_frontier, check.candidates, check.compared, check.frontier, 128)
    places = gpu._places(2, 3, rows.device)
    pairs[(1,)](rows, best, index, *places, scores, ids, 46340, 2, 3, *constants, num_warps=1)
    assert ids.tolist() == [[46340**2 - 1, 46340**2 - 1 - 46340]]  # the tie goes to the lower id
    assert scores.tolist() == [[22.0, 21.0]]
