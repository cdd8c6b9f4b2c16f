"""product_key_topk: equal to brute force over all N scores, ties and extremes included; each known mutant is caught."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyexperts.bench.measurement import torch_threads
from tinyexperts.errors import InputError
from tinyexperts.ops import product_key_topk
from tinyexperts.ops.product_key_topk import portable, reference

pytestmark = pytest.mark.usefixtures("kernels")

# Triton's interpreter takes a second a row.
EXAMPLES = 10 if os.environ.get("TRITON_INTERPRET") == "1" else 300


@st.composite
def problems(draw):
    num_sub_keys = draw(st.integers(1, 13))
    k = draw(st.integers(1, num_sub_keys))
    num_tokens, num_heads, half = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    key_shape = (2, num_sub_keys, half) if draw(st.booleans()) else (num_heads, 2, num_sub_keys, half)
    # Eighths: their products and sums are exact in any order, so that results can be compared to the bit.
    query = torch.randn(num_tokens, num_heads, 2 * half, generator=generator).mul(8).round() / 8
    keys = torch.randn(key_shape, generator=generator).mul(8).round() / 8
    kind = draw(st.sampled_from(["normal", "integers", "equal keys", "zero query", "one half huge", "huge", "tiny"]))
    if kind == "integers":
        query, keys = query.round(), keys.round()
    elif kind == "equal keys":
        keys = keys[..., :1, :].expand(key_shape).contiguous()
    elif kind == "zero query":
        query = torch.zeros_like(query)
    elif kind == "one half huge":
        # Sums round to the huge half: ties between pairs that the sorted halves order.
        query[..., :half] *= 2.0**30
    elif kind == "huge":
        query *= 2.0**119
    elif kind == "tiny":
        query *= 2.0**-139
    return query, keys, k


@settings(max_examples=EXAMPLES, deadline=None)
@given(problems())
def test_equals_brute_force_over_all_scores(problem):
    query, keys, k = problem
    scores, ids = product_key_topk(query, keys, k)
    expected_scores, expected_ids = reference.product_key_topk(query, keys, k)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize(
    ("num_sub_keys", "k"),
    [
        *(
            (24, 16),
            (64, 16),
            (65, 40),
            (110, 1),
            (128, 16),
            (130, 31),
            (192, 16),
            (255, 20),
        ),  # columns of few elements
        *((256, 1), (257, 16), (300, 16), (300, 33), (1000, 8), (1000, 100), (1024, 16), (1024, 1024)),
    ],
)
@pytest.mark.parametrize(
    "kind", ["normal", "quarters", "two values", "equal", "ascending", "one half huge", "infinite"]
)
def test_equals_brute_force_in_long_rows(num_sub_keys, k, kind):
    generator = torch.Generator().manual_seed(num_sub_keys + k)
    keys = torch.randn(2, num_sub_keys, 1, generator=generator)  # times 1, 0 or -1: the scores themselves
    query = torch.tensor([[[1.0, 1.0]], [[-1.0, 1.0]], [[0.0, -1.0]]])
    if kind == "quarters":
        keys = keys.mul(4).round() / 4
    elif kind == "two values":
        keys = keys.sign()
    elif kind == "equal":
        keys = torch.ones_like(keys)
    elif kind == "ascending":
        keys = keys.sort(dim=1).values
    elif kind == "one half huge":
        query[:, :, 0] *= 2.0**25
    elif kind == "infinite":
        keys[1, num_sub_keys * 3 // 4], keys[1, num_sub_keys // 3], query = float("inf"), float("-inf"), query[:1]
    scores, ids = product_key_topk(query, keys, k)
    expected_scores, expected_ids = reference.product_key_topk(query, keys, k)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize("seed", range(20))
def test_lowest_ids_come_in_where_pairs_outside_the_candidates_tie(seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 330, 1, generator=generator).mul(3).round()
    scores, ids = product_key_topk(torch.ones(1, 1, 2), keys, 16)
    expected_scores, expected_ids = reference.product_key_topk(torch.ones(1, 1, 2), keys, 16)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


def test_equals_brute_force_at_the_papers_sizes_across_chunks():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(700, 4, 16, generator=generator), torch.randn(2, 1024, 8, generator=generator)
    assert portable.tokens_per_chunk(4, 1024) < 700
    scores, ids = product_key_topk(query, keys, 16)
    for part in range(0, 700, 175):
        # A matrix product of another shape differs in the last bit: compare to a tolerance.
        expected, expected_ids = reference.product_key_topk(query[part : part + 2], keys, 16)
        torch.testing.assert_close(scores[part : part + 2], expected)
        assert (ids[part : part + 2] == expected_ids).float().mean() > 0.95
    i, j = ids // 1024, ids % 1024
    q1, q2 = query[..., None, :8], query[..., None, 8:]
    torch.testing.assert_close(scores, (q1 * keys[0][i]).sum(-1) + (q2 * keys[1][j]).sum(-1), rtol=1e-4, atol=1e-5)


def test_only_candidate_pairs_can_be_above_the_kth_score():
    candidates, frontier = portable.candidate_places(16, 1024)
    assert len(candidates) == 50
    assert all((i + 1) * (j + 1) <= 16 for i, j in candidates)
    assert all((i + 1) * (j + 1) > 16 and (i, j - 1) in [*candidates, (16, -1)] for i, j in frontier)


@pytest.mark.parametrize("shared", [True, False])
def test_every_expert_can_be_reached(shared):
    num_sub_keys, num_heads = 9, 2
    keys = torch.eye(num_sub_keys).expand(*(() if shared else (num_heads,)), 2, -1, -1).contiguous()
    i, j = torch.meshgrid(torch.arange(num_sub_keys), torch.arange(num_sub_keys), indexing="ij")
    query = torch.cat([keys.view(-1, 2, 9, 9)[0, 0][i.flatten()], keys.view(-1, 2, 9, 9)[0, 1][j.flatten()]], -1)
    scores, ids = product_key_topk(query.unsqueeze(1).expand(-1, num_heads, -1), keys, 3)
    assert torch.equal(ids[:, :, 0], torch.arange(81).unsqueeze(1).expand(-1, num_heads))
    assert torch.equal(scores[:, :, 0], torch.full((81, num_heads), 2.0))


def _mutant_top_one(scores, ids, k, num_sub_keys):
    return ids[..., :1].expand_as(ids)


def _mutant_stride_k(scores, ids, k, num_sub_keys):
    return ids // num_sub_keys * k + ids % num_sub_keys


def _mutant_first_axis_without_stride(scores, ids, k, num_sub_keys):
    return ids // num_sub_keys + ids % num_sub_keys


def _mutant_position_as_id(scores, ids, k, num_sub_keys):
    return torch.arange(ids.shape[-1]).expand_as(ids)


@pytest.mark.parametrize(
    "mutant",
    [_mutant_top_one, _mutant_stride_k, _mutant_first_axis_without_stride, _mutant_position_as_id],
)
def test_each_fault_of_public_implementations_is_caught(mutant, monkeypatch):
    right = product_key_topk

    def planted(query_MHQ, sub_keys, k):
        scores, ids = right(query_MHQ, sub_keys, k)
        return scores, mutant(scores, ids, k, sub_keys.shape[-2])

    monkeypatch.setitem(globals(), "product_key_topk", planted)
    if mutant is not _mutant_top_one:
        with pytest.raises(AssertionError):
            test_every_expert_can_be_reached(True)
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(5, 2, 8, generator=generator), torch.randn(2, 9, 4, generator=generator)
    assert not torch.equal(product_key_topk(query, keys, 3)[1], reference.product_key_topk(query, keys, 3)[1])


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_in_double_precision(shared):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    shape = (2, 7, 3) if shared else (2, 2, 7, 3)
    keys = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, c: product_key_topk(q, c, 5)[0], (query, keys))


def test_gradients_equal_plain_autograd_and_touch_chosen_sub_keys_only():
    generator = torch.Generator().manual_seed(2)
    query, keys = torch.randn(4, 2, 8, generator=generator), torch.randn(2, 50, 4, generator=generator)
    grad = torch.randn(4, 2, 3, generator=generator)
    results = []
    for function in (product_key_topk, reference.product_key_topk):
        leaves = [query.clone().requires_grad_(), keys.clone().requires_grad_()]
        scores, ids = function(*leaves, 3)
        scores.backward(grad)
        results.append((leaves[0].grad, leaves[1].grad, ids))
    torch.testing.assert_close(results[0], results[1])
    chosen = torch.zeros(2, 50, dtype=torch.bool)
    chosen[0, results[0][2].flatten() // 50] = True
    chosen[1, results[0][2].flatten() % 50] = True
    assert torch.equal(results[0][1].abs().sum(-1) > 0, chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_narrow_queries_are_fp32(dtype):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(4, 2, 8, generator=generator).to(dtype).requires_grad_()
    keys = torch.randn(2, 9, 4, generator=generator).to(dtype).requires_grad_()
    scores, ids = product_key_topk(query, keys, 3)
    expected, expected_ids = reference.product_key_topk(query.detach().float(), keys.detach().float(), 3)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)  # a rounding to 16 bits would be 1e-3
    assert torch.equal(ids, expected_ids)
    scores.sum().backward()
    assert query.grad.dtype == keys.grad.dtype == dtype


def test_nan_query_gives_nan_scores_and_valid_ids():
    query = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(4))
    query[1] = float("nan")
    scores, ids = product_key_topk(query, torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(5)), 3)
    assert scores[1].isnan().all()
    assert not scores[[0, 2]].isnan().any()
    assert ((ids >= 0) & (ids < 25)).all()


@pytest.mark.parametrize("num_sub_keys", [5, 24, 64, 128, 130, 300, 1024])
def test_a_sub_key_that_is_nan_gives_nan_scores(num_sub_keys):
    generator = torch.Generator().manual_seed(11)
    query, keys = torch.ones(3, 1, 2), torch.randn(2, num_sub_keys, 1, generator=generator)
    for half, position in ((0, 3), (1, num_sub_keys - 1)):
        broken = keys.clone()
        broken[half, position] = float("nan")
        scores, ids = product_key_topk(query, broken, 4)
        assert scores[..., 0].isnan().all()
        assert ((ids >= 0) & (ids < num_sub_keys**2)).all()
        chosen = (ids // num_sub_keys, ids % num_sub_keys)[half][..., 0]
        assert (chosen == position).all()


def test_scores_that_overflow_to_nan_give_valid_ids():
    """inf - inf is NaN: among such sums there is no order, but every id must be one of the N."""
    half = torch.tensor([1e20, -1e20, 1e20, -1e20])
    keys = half.view(1, 4, 1).expand(2, 4, 1).contiguous()
    for first, second in ((1e20, 1e20), (1e20, -1e20), (-1e20, 1e20)):
        for k in (1, 2, 4):
            scores, ids = product_key_topk(torch.tensor([[[first, second]]]), keys, k)
            assert ((ids >= 0) & (ids < 16)).all()
            assert len(ids.unique()) == k
            i, j = ids // 4, ids % 4
            expected = first * half[i] + second * half[j]
            assert torch.equal(scores.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


def test_scores_that_are_nan_stay_above_infinite_ties():
    keys = torch.zeros(2, 16, 1)
    keys[0, :3] = torch.inf
    keys[1, 5:7] = -torch.inf
    keys[1, 8:] = torch.inf
    query = torch.ones(1, 1, 2)
    scores, ids = product_key_topk(query, keys, 16)
    # The candidates' NaN: of all N scores four more are, which nobody has looked at.
    expected, _ = portable.product_key_topk(query, keys, 16)
    assert torch.equal(scores.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
    assert len(ids.unique()) == 16


def test_many_tied_rows_in_chunks_equal_one_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(10)
    query = torch.randn(12, 2, 8, generator=generator)
    query[::3] = 0
    query[1::3, :, :4] *= 1e9
    keys = torch.randn(2, 9, 4, generator=generator)
    expected = reference.product_key_topk(query, keys, 4)
    for pairs in (1 << 20, 1):
        monkeypatch.setattr(portable, "_CHUNK_TIES", pairs)
        got = product_key_topk(query, keys, 4)
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[0], expected[0])


def test_opcheck():
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(3, 2, 6, generator=generator, requires_grad=True)
    for shape in ((2, 7, 3), (2, 2, 7, 3)):
        keys = torch.randn(shape, generator=generator, requires_grad=True)
        torch.library.opcheck(torch.ops.tinyexperts.product_key_topk, (query, keys, 4))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first use of forward mode
def test_forward_mode_derivatives_are_refused(place):
    inputs = [torch.randn(3, 2, 6), torch.randn(2, 7, 3)]

    def scores(changed):
        return product_key_topk(*inputs[:place], changed, *inputs[place + 1 :], 4)[0]

    with pytest.raises(InputError, match="product_key_topk has no forward-mode derivative"):
        torch.func.jvp(scores, (inputs[place],), (inputs[place],))
    with torch.autograd.forward_ad.dual_level():
        scores(inputs[place])  # without a tangent


def test_non_contiguous_inputs_equal_contiguous_ones():
    generator = torch.Generator().manual_seed(7)
    query = (
        torch.randn(6, 2, 5, generator=generator).transpose(0, 2)[:, :, :4].transpose(1, 2)[:, :, :2].repeat(1, 1, 2)
    )
    keys = torch.randn(2, 2, 9, generator=generator).transpose(1, 2)
    for got, expected in zip(
        product_key_topk(query, keys, 4), product_key_topk(query.contiguous(), keys.contiguous(), 4), strict=True
    ):
        assert torch.equal(got, expected)


def test_operands_on_several_devices_are_refused():
    with pytest.raises(InputError, match="product_key_topk must be on one device, got query on cpu, sub_keys on meta"):
        product_key_topk(torch.ones(3, 1, 4), torch.ones(2, 9, 2, device="meta"), 3)


@pytest.mark.parametrize(
    ("query_shape", "key_shape", "k", "message"),
    [
        ((3, 2, 8), (2, 9, 4), 10, "k must be between 1 and .* 9, got 10"),
        ((3, 2, 8), (2, 9, 4), 0, "got 0"),
        ((3, 2, 7), (2, 9, 3), 2, r"got \[3, 2, 7\]"),
        ((3, 2, 8), (3, 2, 9, 4), 2, r"\[3, 2, 9, 4\]"),
        ((3, 8), (2, 9, 4), 2, r"got \[3, 8\]"),
    ],
)
def test_bad_input_is_refused(query_shape, key_shape, k, message):
    with pytest.raises(InputError, match=message):
        product_key_topk(torch.randn(query_shape), torch.randn(key_shape), k)


@pytest.mark.parametrize("shared", [True, False])
def test_chunks_and_threads_change_neither_results_nor_gradients(monkeypatch, kernels, shared):
    generator = torch.Generator().manual_seed(8)
    query = torch.randn(137, 2, 8, generator=generator).mul(8).round() / 8
    keys = torch.randn((2, 9, 4) if shared else (2, 2, 9, 4), generator=generator).mul(8).round() / 8
    grad = torch.randn(137, 2, 3, generator=generator)
    results = []
    module = importlib.import_module(portable.__name__.replace("portable", kernels.replace("triton", "gpu")))
    for elements, threads in ((1 << 22, 1), (1 << 22, 2), (100, 1), (1000, 2)):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        leaves = [query.clone().requires_grad_(), keys.clone().requires_grad_()]
        with torch_threads(threads):
            scores, ids = product_key_topk(*leaves, 3)
            scores.backward(grad)
        results.append((scores, ids, leaves[0].grad, leaves[1].grad))
    expected = reference.product_key_topk(query, keys, 3)
    for result in results:
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])
        assert torch.equal(result[2], results[0][2])
        if kernels == "cpu":
            assert torch.equal(result[3], results[0][3])
    leaves = [query.clone().requires_grad_(), keys.clone().requires_grad_()]
    reference.product_key_topk(*leaves, 3)[0].backward(grad)
    torch.testing.assert_close(results[0][2:], (leaves[0].grad, leaves[1].grad))


def test_autocast_changes_no_bit():
    generator = torch.Generator().manual_seed(9)
    query, keys = torch.randn(9, 2, 8, generator=generator), torch.randn(2, 9, 4, generator=generator)
    expected = product_key_topk(query, keys, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = product_key_topk(query, keys, 3)
    assert got[0].dtype == torch.float32
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@settings(max_examples=EXAMPLES, deadline=None)
@given(problems(), st.sampled_from([1 << 27, 60]), st.sampled_from([1 << 25, 1]))
def test_what_accelerators_run_in_plain_torch_equals_brute_force(problem, elements, ties):
    query, keys, k = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_CHUNK_ELEMENTS_OF_ACCELERATORS", elements)
        patch.setattr(portable, "_CHUNK_TIES_OF_ACCELERATORS", ties)
        scores, ids = portable._with_one_wait(query, keys, k)
    expected_scores, expected_ids = reference.product_key_topk(query, keys, k)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


def test_what_accelerators_run_keeps_nan_and_valid_ids():
    keys = torch.zeros(2, 16, 1)
    keys[0, :3] = torch.inf
    keys[1, 5:7] = -torch.inf
    keys[1, 8:] = torch.inf
    query = torch.tensor([[[1.0, 1.0]], [[0.5, 0.0]], [[torch.nan, 1.0]]])
    expected, _ = portable.product_key_topk(query, keys, 16)
    scores, ids = portable._with_one_wait(query, keys, 16)
    assert torch.equal(scores.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
    assert all(len(row.unique()) == 16 for row in ids.flatten(0, 1))


def test_gradients_of_what_accelerators_run_reach_rows_with_ties():
    generator = torch.Generator().manual_seed(12)
    query = torch.randint(-1, 2, (5, 2, 4), generator=generator).float()
    keys, grad = torch.randint(-1, 2, (2, 2, 9, 2), generator=generator).float(), torch.randn(5, 2, 4)
    results = []
    for function in (portable._with_one_wait, reference.product_key_topk):
        leaves = [query.clone().requires_grad_(), keys.clone().requires_grad_()]
        function(*leaves, 4)[0].backward(grad)
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)
