"""The kernels compute with operands of any kind: past 2^31 elements, NaN, empty, strided, of different types."""

from __future__ import annotations

import functools
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from operands import (
    SEVERAL_PARTS,
    assert_equal,
    dense,
    layer_results,
    make_layer,
    make_small_layer,
    operator_results,
    problem,
    randn,
)

from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.bench.measurement import torch_threads
from tinyexperts.ops import expert_mlp
from tinyexperts.ops.expert_mlp import cpu as expert_cpu
from tinyexperts.ops.expert_mlp import reference, row_sums
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients

ACTIVATIONS = [(1, None), (2, "gelu"), (2, "relu"), (2, "relu2"), (2, "silu"), (3, "gelu"), (3, "silu")]

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs memory that is taken only where it is touched"
)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@linux_only
@pytest.mark.parametrize("fused", [False, True])
def test_a_table_of_more_than_2_to_31_elements_is_read_and_trained_at_its_end(fused):
    num_experts, dim = 2**23 + 3, 257
    before = resident_bytes()
    try:
        table = torch.from_numpy(np.zeros((num_experts, 1, dim), dtype=np.float32)).requires_grad_()
        optimizer = RowSparseAdam([table], lr=0.5, second_moment="row", fused=fused)
    except MemoryError:
        pytest.skip("no 8 GiB of addresses")
    assert table.numel() > 2**31
    # Six rows: the first and the last ones, one on each side of element 2^31, and one that all tokens share.
    middle = 2**31 // dim
    rows = torch.tensor([0, middle - 1, middle + 1, num_experts - 3, num_experts - 2, num_experts - 1])
    values = randn(6, dim, seed=1)
    with torch.no_grad():
        table[rows, 0] = values
    # Token m retrieves rows m, m + 1, ... of the six, and the last one.
    chosen = torch.stack([(torch.arange(4) + token) % 6 for token in range(5)] + [torch.full((4,), 5)])
    weights, grad = randn(6, 4, seed=2), randn(6, dim, seed=3)
    x = torch.zeros(6, dim)
    try:
        y = expert_mlp(x, table, rows[chosen], weights, None, sparse=True)
        with deferred_gradients([optimizer]):
            y.backward(grad)
        one_hot_MC = torch.zeros(6, 6, dtype=torch.float64).scatter_add_(1, chosen, weights.double())
        torch.testing.assert_close(y.double(), one_hot_MC @ values.double(), rtol=1e-5, atol=1e-5)
        expected = (one_hot_MC.T @ grad.double()).float()
        if not fused:
            assert torch.equal(table.grad._indices()[0], rows)
            torch.testing.assert_close(table.grad._values()[:, 0], expected, rtol=1e-5, atol=1e-5)
        optimizer.step()
    except MemoryError:
        pytest.skip("no 16 GiB of addresses")
    # The first step of Adam, with one second moment a row, goes along the gradient, whose mean square it makes one.
    step = expected / expected.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(table.detach()[rows, 0], values - 0.5 * step, rtol=1e-4, atol=1e-4)
    neighbors = torch.tensor([1, middle - 2, middle, middle + 2, num_experts - 4])
    assert not table.detach()[neighbors].any()
    # A touched row may bring in a huge page of 2 MiB, in the table and its moments.
    assert resident_bytes() - before < 200 * 2**20


@linux_only
def test_the_last_of_more_than_2_to_31_retrieved_experts_are_summed():
    # The kernels themselves, for the last two tokens: the other pages of these arrays are never touched.
    num_retrieved, num_tokens = 2**16, 2**15 + 3
    assert (num_tokens - 2) * num_retrieved > 2**31
    shape = (num_tokens, num_retrieved)
    try:
        ids_MP, weights_MP = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        pre_FMP, coefficient_MP = np.zeros((1, *shape), dtype=np.float32), np.zeros(shape, dtype=np.float32)
        grad_weights_MP, factors_EMP = np.zeros(shape, dtype=np.float32), np.zeros((2, *shape), dtype=np.float32)
    except MemoryError:
        pytest.skip("no 64 GiB of addresses")
    last = slice(num_tokens - 2, num_tokens)
    x, grad_y, experts = randn(num_tokens, 5, seed=1), randn(num_tokens, 5, seed=2), randn(7, 2, 5, seed=3)
    ids, weights = (
        torch.randint(7, (2, num_retrieved), generator=torch.Generator().manual_seed(4)),
        randn(2, num_retrieved, seed=5),
    )
    ids_MP[last], weights_MP[last] = ids, weights
    y, grad_x = np.zeros(x.shape, dtype=np.float32), np.zeros(x.shape, dtype=np.float32)
    no_scales, constants = np.zeros((0, 0), dtype=np.float32), expert_cpu._constants(torch.float32)
    expert_cpu._forward(
        x.numpy(), experts.numpy(), ids_MP, weights_MP, no_scales, 2, constants, y, pre_FMP, last.start, last.stop
    )
    leaves = [t.clone().requires_grad_() for t in (x[last], experts, weights)]
    expected, _ = reference.expert_mlp(leaves[0], leaves[1], ids, leaves[2], "relu")
    expected.backward(grad_y[last])
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-2)  # of sums of 65,536 numbers
    close(torch.from_numpy(y[last]), expected.detach())
    assert not y[: last.start].any()

    coefficient_MP[last] = np.maximum(pre_FMP[0, last], 0)
    pre_FMP[0, last] = pre_FMP[0, last] > 0  # the derivative of ReLU
    expert_cpu._backward(
        grad_y.numpy(), experts.numpy(), ids_MP, weights_MP, coefficient_MP, pre_FMP, no_scales, constants,
        grad_x, grad_weights_MP, factors_EMP, last.start, last.stop,
    )  # fmt: skip
    close(torch.from_numpy(grad_x[last]), leaves[0].grad)
    close(torch.from_numpy(grad_weights_MP[last]), leaves[2].grad)
    rows, order, starts = row_sums.find_touched_rows(ids)
    order += last.start * num_retrieved
    grad_rows = row_sums.sum_gradient_rows(order, starts, torch.from_numpy(factors_EMP), x, grad_y)
    close(grad_rows, leaves[1].grad[rows])


@pytest.mark.parametrize(("num_vectors", "activation"), ACTIVATIONS[1:])
@pytest.mark.parametrize("broken", [[0], [2, 130]])
def test_nan_in_a_token_stays_in_its_outputs_and_its_experts(num_vectors, activation, broken, two_kernel_threads):
    inputs = problem(num_vectors, **SEVERAL_PARTS)
    expected = operator_results(inputs, activation)
    x = inputs[0].clone()
    x[broken, 5] = torch.nan
    y, grad_x, grad_experts, grad_weights = operator_results((x, *inputs[1:]), activation)
    fine = torch.ones(len(x), dtype=torch.bool)
    fine[broken] = False
    assert y[broken].isnan().all()
    for got, plain in ((y, expected[0]), (grad_x, expected[1]), (grad_weights, expected[3])):
        assert torch.equal(got[fine], plain[fine])
    assert grad_weights[broken].isnan().all()
    untouched = torch.ones(len(inputs[1]), dtype=torch.bool)
    untouched[inputs[2][broken].flatten()] = False
    assert torch.equal(grad_experts[untouched], expected[2][untouched])
    assert grad_experts[~untouched].isnan().any((1, 2)).all()


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
@pytest.mark.parametrize("num_sub_keys", [16, 256])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_leaves_the_other_tokens_of_a_layer_alone(
    kind, num_sub_keys, value, two_kernel_threads
):
    layer, x = make_small_layer(kind, num_sub_keys**2, query_norm="layer"), randn(70, 32)
    expected = layer_results(layer, x)[0]
    x[3, 2] = x[69, 0] = value
    got = layer_results(layer, x)
    fine = torch.ones(70, dtype=torch.bool)
    fine[[3, 69]] = False
    assert got[0][~fine].isnan().all()
    assert torch.equal(got[0][fine], expected[fine])
    assert got[1][fine].isfinite().all()


@pytest.mark.parametrize(("num_vectors", "activation"), [(1, None), (2, "gelu"), (3, "silu")])
@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_no_tokens_or_no_experts_give_zeros_and_empty_gradients(num_vectors, activation, num_tokens, threads):
    retrieved = 0 if num_tokens else 4
    inputs = problem(num_vectors, num_tokens=num_tokens, num_experts=7, model_dim=5, retrieved=retrieved)
    with torch_threads(threads):
        for sparse in (False, True):
            y, grad_x, grad_experts, grad_weights = operator_results(inputs, activation, sparse=sparse)
            assert torch.equal(y, torch.zeros(num_tokens, 5))
            assert torch.equal(grad_x, torch.zeros(num_tokens, 5))
            assert grad_weights.shape == (num_tokens, retrieved)
            assert grad_experts.shape == (7, num_vectors, 5)
            assert grad_experts.is_sparse == sparse
            assert not dense(grad_experts).any()
            assert not sparse or grad_experts._nnz() == 0


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_empty_batch_leaves_a_fused_table_as_it_is(second_moment, threads):
    layer = make_layer(sparse=True)
    optimizer = RowSparseAdam([layer.experts], second_moment=second_moment, weight_decay=0.1, fused=True)
    before = layer.experts.detach().clone()
    with torch_threads(threads):
        x = torch.zeros(0, 64, requires_grad=True)
        y = layer(x)
        with deferred_gradients([optimizer]):
            y.sum().backward()
        assert y.shape == x.grad.shape == (0, 64)
        assert pending_gradient(layer.experts.grad) is not None
        assert clip_gradient_norm_([layer.experts], 1.0) == 0
        optimizer.step()
    assert torch.equal(layer.experts, before)
    assert not any(optimizer.state[layer.experts][name].any() for name in ("exp_avg", "exp_avg_sq"))


def strided(tensor):
    """The same values, in every other place of a larger tensor whose dimensions lie the other way round."""
    dims = tuple(reversed(range(tensor.dim())))
    room = torch.full([2 * size for size in tensor.permute(dims).shape], 77).to(tensor.dtype)
    view = room[tuple(slice(1, None, 2) for _ in dims)].permute(dims)
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view


@pytest.mark.parametrize("which", [0, 1, 2, 3, "grad", "all"])
@pytest.mark.parametrize(("num_vectors", "activation"), [(1, None), (2, "gelu"), (3, "silu")])
def test_inputs_that_are_not_contiguous_equal_contiguous_ones(which, num_vectors, activation):
    inputs = problem(num_vectors, num_tokens=9, num_experts=50, model_dim=37, retrieved=6)
    grad, results = randn(9, 37, seed=6), []
    for change in (False, True):
        tensors = [strided(t) if change and which in (i, "all") else t.clone() for i, t in enumerate(inputs)]
        x, experts, ids, weights = (t.requires_grad_(t.is_floating_point()) for t in tensors)
        y = expert_mlp(x, experts, ids, weights, activation)
        y.backward(strided(grad) if change and which in ("grad", "all") else grad)
        results.append([y.detach(), *(t.grad for t in (x, experts, weights) if t.grad is not None)])
    assert_equal(results[1], results[0])


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MIXED = [  # the types of x, table and weights
    (torch.float64, torch.float32, torch.float32),
    (torch.float64, torch.bfloat16, torch.float64),
    (torch.float32, torch.float64, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda dtypes: "-".join(str(t).removeprefix("torch.") for t in dtypes))
@pytest.mark.parametrize(("num_vectors", "activation"), [(1, None), (2, "gelu"), (3, "silu")])
def test_operands_of_different_types_equal_the_formula_in_double_precision(dtypes, num_vectors, activation):
    inputs = problem(num_vectors, num_tokens=19, num_experts=50, model_dim=37, retrieved=6, dtype=torch.float64)
    narrow = [t.to(dtype) for t, dtype in zip((inputs[0], inputs[1], inputs[3]), dtypes, strict=True)]
    results = []
    for wide in (False, True):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in narrow]
        function = reference.expert_mlp if wide else expert_mlp
        y = function(leaves[0], leaves[1], inputs[2], leaves[2], activation)
        y = y[0] if wide else y
        y.backward(randn(19, 37, seed=6, dtype=dtypes[0]).to(y.dtype))
        results.append([y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)])
    computed_in = 1e-12 if torch.float64 in dtypes[:2] else 1e-5
    for got, expected in zip(*results, strict=True):
        tolerance = max(computed_in, TOLERANCE[got.dtype])
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert [t.dtype for t in results[0]] == [dtypes[0], *dtypes]
