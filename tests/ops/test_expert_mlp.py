"""expert_mlp: outputs and every gradient against plain autograd and the formula, sparse and dense."""

from __future__ import annotations

import pytest
import torch
from operands import problem

from tinyexperts.bench.measurement import torch_threads
from tinyexperts.errors import InputError
from tinyexperts.ops import expert_mlp, quantize_vectors
from tinyexperts.ops.expert_mlp import cpu, int8, portable, reference

CASES = [
    (1, None),
    *((2, a) for a in ("gelu", "relu", "relu2", "silu")),
    *((3, a) for a in ("gelu", "relu", "relu2", "silu")),
]


pytestmark = pytest.mark.usefixtures("kernels")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def by_hand(x, experts, ids, weights, activation):
    """Token by token, expert by expert: the paper's formula, nothing vectorized."""
    act = {
        "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
        "relu": lambda h: h.clamp(min=0),
        "relu2": lambda h: h.clamp(min=0) ** 2,
        "silu": lambda h: h * torch.sigmoid(h),
    }
    outputs = []
    for token in range(len(x)):
        y = torch.zeros_like(x[token])
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            vectors = experts[expert]
            scale = weight
            if activation is not None:
                scale = scale * act[activation](vectors[0] @ x[token])
            if len(vectors) == 3:
                scale = scale * (vectors[1] @ x[token])
            y = y + scale * vectors[-1]
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(("num_vectors", "activation"), CASES)
def test_equals_the_formula_and_its_autograd(num_vectors, activation):
    inputs = problem(num_vectors, dtype=torch.float64)
    grad = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    results = []
    for function in (expert_mlp, by_hand, lambda *arguments: reference.expert_mlp(*arguments)[0]):
        x, experts, ids, weights = (t.clone().requires_grad_(t.is_floating_point()) for t in inputs)
        y = function(x, experts, ids, weights, activation)
        y.backward(grad)
        results.append((y, x.grad if x.grad is not None else torch.zeros_like(x), experts.grad, weights.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[2], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_vectors", "activation"), CASES)
def test_gradcheck_in_double_precision(num_vectors, activation):
    x, experts, ids, weights = problem(
        num_vectors, num_tokens=3, num_experts=6, model_dim=3, retrieved=4, dtype=torch.float64
    )
    leaves = [t.requires_grad_() for t in (x, experts, weights)]
    assert torch.autograd.gradcheck(lambda x, e, w: expert_mlp(x, e, ids, w, activation), leaves)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_tokens", "model_dim", "retrieved"), [(1, 1, 1), (0, 5, 3), (63, 100, 2), (17, 33, 31)])
def test_odd_sizes_chunks_and_dtypes(dtype, num_tokens, model_dim, retrieved, monkeypatch):
    monkeypatch.setattr(portable, "_CHUNK_ELEMENTS", 4000)
    inputs = problem(2, num_tokens=num_tokens, model_dim=model_dim, retrieved=retrieved, dtype=dtype)
    results = []
    for wide in (False, True):
        x, experts, ids, weights = (
            (t.double() if wide and t.is_floating_point() else t.clone()).requires_grad_(t.is_floating_point())
            for t in inputs
        )
        # The truth is computed in fp64 from the same narrow values.
        y = (
            reference.expert_mlp(x, experts, ids, weights, "gelu")[0]
            if wide
            else expert_mlp(x, experts, ids, weights, "gelu")
        )
        y.sum().backward()
        results.append([t.double() for t in (y, x.grad, experts.grad, weights.grad)])
        if not wide:
            assert y.dtype == x.grad.dtype == experts.grad.dtype == weights.grad.dtype == dtype
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            got,
            expected,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * max(1, expected.abs().max().item() if expected.numel() else 1),
        )


@pytest.mark.parametrize(("num_vectors", "activation"), [(1, None), (2, "gelu"), (3, "relu2")])
def test_sparse_table_gradient_holds_the_touched_rows_of_the_dense_one(num_vectors, activation):
    x, experts, ids, weights = problem(num_vectors, num_experts=1000)
    experts = experts / 4  # so that no neuron is saturated
    ids[:, 1] = ids[:, 0]  # an expert that two heads retrieved
    grads = []
    for sparse in (True, False):
        table = experts.clone().requires_grad_()
        expert_mlp(x, table, ids, weights, activation, sparse=sparse).square().sum().backward()
        grads.append(table.grad)
    assert grads[0].layout == torch.sparse_coo
    assert torch.equal(grads[0]._indices()[0], ids.unique())
    assert torch.equal(grads[0].to_dense(), grads[1])
    if activation != "relu2":
        assert (grads[1][ids.unique()].abs().amax((1, 2)) > 0).all(), "every retrieved expert receives gradient"


def test_extreme_inputs_stay_finite_where_the_formula_is():
    x, experts, ids, weights = problem(2, dtype=torch.float32)
    for activation in ("gelu", "relu", "silu"):
        leaves = [t.clone().requires_grad_() for t in (x * 1e12, experts, weights)]
        y = expert_mlp(leaves[0], leaves[1], ids, leaves[2], activation)
        y.sum().backward()
        assert all(t.isfinite().all() for t in (y, *(leaf.grad for leaf in leaves)))


def test_bit_equal_for_any_number_of_threads_and_chunks(monkeypatch):
    inputs = problem(2, num_tokens=300, num_experts=50, model_dim=64, retrieved=16)
    results = []
    for threads, chunk in ((1, 1 << 24), (2, 1 << 24), (2, 10_000)):
        monkeypatch.setattr(portable, "_CHUNK_ELEMENTS", chunk)
        experts = inputs[1].clone().requires_grad_()
        with torch_threads(threads):
            expert_mlp(inputs[0], experts, *inputs[2:], "gelu").sum().backward()
        results.append(experts.grad)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("sparse", [True, False])
def test_opcheck(sparse):
    for num_vectors, activation in ((1, None), (2, "gelu"), (3, "silu")):
        x, experts, ids, weights = problem(num_vectors)
        leaves = [t.requires_grad_() for t in (x, experts)], weights.requires_grad_()
        torch.library.opcheck(torch.ops.tinyexperts.expert_mlp, (*leaves[0], ids, leaves[1], activation, None, sparse))


@pytest.mark.parametrize("num_vectors", [1, 2, 3])
def test_opcheck_of_the_backward_operators(num_vectors):
    activation = None if num_vectors == 1 else "silu"
    x, experts, ids, weights = problem(num_vectors)
    _, pre = torch.ops.tinyexperts.expert_mlp(x, experts, ids, weights, activation, None, False)
    grad_y = torch.randn_like(x)
    backward = (grad_y, x, experts, ids, weights, pre, activation, None)
    torch.library.opcheck(torch.ops.tinyexperts.expert_mlp_backward, backward)
    factors = torch.ops.tinyexperts.expert_mlp_backward(*backward)[2]
    for operator in (torch.ops.tinyexperts.expert_mlp_gradient_rows, torch.ops.tinyexperts.expert_mlp_dense_gradient):
        torch.library.opcheck(operator, (ids, factors, x, grad_y, experts))


def test_saves_no_gathered_rows():
    x, experts, ids, weights = problem(2, num_tokens=50, model_dim=64, retrieved=16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_mlp(x.requires_grad_(), experts.requires_grad_(), ids, weights, "gelu")
    assert max(t.numel() for t in saved if t is not experts and t.shape != experts.shape) <= 50 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "got 'tanh'"),
        ({"activation": None}, "got None and E = 2"),
        ({"ids": torch.full((5, 6), 23)}, "between 0 and N - 1 = 22, got 23"),
        ({"ids": torch.full((5, 6), -1)}, "got -1"),
        ({"x": torch.zeros(5, 8)}, r"D = 7, got \[5, 8\]"),
        ({"ids": torch.zeros(5, 6, dtype=torch.int32)}, "must be int64, got torch.int32"),
        ({"weights": torch.zeros(5, 5)}, r"\[5, 6\] and \[5, 5\]"),
        ({"experts": torch.zeros(23, 4, 7)}, r"got \[23, 4, 7\]"),
        (
            {"x": torch.zeros(5, 0), "experts": torch.zeros(23, 2, 0)},
            r"at least 1, got x \[5, 0\] and experts \[23, 2, 0\]",
        ),
        ({"experts": torch.zeros(23, 2, 7, device="meta")}, "one device, got x on cpu, experts on meta, ids on cpu, w"),
    ],
)
def test_bad_input_is_refused(change, message, kernels):
    if kernels == "triton" and "got" in message and "ids" in change and change["ids"].dtype == torch.int64:
        pytest.skip("ids are not read before a kernel runs, but in it (TRITON_DEBUG=1)")
    x, experts, ids, weights = problem(2)
    arguments = {"x": x, "experts": experts, "ids": ids, "weights": weights, "activation": "gelu"} | change
    with pytest.raises(InputError, match=message):
        expert_mlp(*arguments.values())


def test_no_more_rows_are_gathered_than_a_chunk_holds(monkeypatch, kernels):
    if kernels != "portable":
        pytest.skip("gathers nothing")
    gathered, gather = [], portable._Vectors._gather
    monkeypatch.setattr(portable, "_CHUNK_ELEMENTS", 4000)
    monkeypatch.setattr(portable._Vectors, "_gather", lambda *a: gathered.append(gather(*a).numel()) or gather(*a))
    for dtype, num_vectors in ((torch.float32, 1), (torch.bfloat16, 2)):  # sums of fp32 vectors gather nothing
        gathered.clear()
        x, experts, ids, weights = problem(2, num_tokens=100, model_dim=16, retrieved=8, dtype=dtype)
        expert_mlp(x, experts.requires_grad_(), ids, weights, "gelu").sum().backward()
        assert sum(gathered) == 2 * 100 * 8 * num_vectors * 16  # once forward, once backward
        assert max(gathered) <= 4000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_narrow_tables_are_kept_in_fp32(dtype):
    # 1 + 999 * 1/512 added one by one in bf16 would stay at 1.
    experts = torch.full((2, 1, 1), 1 / 512, dtype=dtype)
    experts[0] = 1.0
    ids = torch.ones(1, 1000, dtype=torch.int64)
    ids[0, 0] = 0
    weights = torch.ones(1, 1000, requires_grad=True)
    x = torch.ones(1, 1, dtype=dtype)
    table = experts.requires_grad_()
    y = expert_mlp(x, table, ids, weights, None)
    assert y.item() == pytest.approx(1 + 999 / 512, rel=8e-3)
    y.sum().backward()
    assert table.grad[1].item() == pytest.approx(999, rel=8e-3)


@pytest.mark.parametrize("model_dim", [1, 16], ids=["alone", "in vectors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_exactly(dtype, model_dim):
    # Subnormals, infinities and NaN among them. No second expert: 0 * infinity would be NaN.
    experts = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1, model_dim)
    ids = torch.arange(len(experts))[:, None]
    y = expert_mlp(torch.zeros(len(ids), model_dim), experts, ids, torch.ones(len(ids), 1), None)
    torch.testing.assert_close(y, experts[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_vectors", "activation"), [(2, "relu"), (3, "silu")])
def test_pre_activations_of_narrow_tables_are_fp32(dtype, num_vectors, activation):
    # The products with u are 1 + n/1024: in bf16 or fp16 they would round, and so would the gradients made of them.
    experts = torch.ones(8, num_vectors, 2, dtype=dtype)
    experts[:, 0, 1] = torch.arange(8).to(dtype) / 1024
    x = torch.ones(1, 2, dtype=dtype)
    ids, weights = torch.arange(8)[None], torch.ones(1, 8)
    _, pre_activations = torch.ops.tinyexperts.expert_mlp(x, experts, ids, weights, activation, None, False)
    assert pre_activations.dtype == torch.float32
    assert torch.equal(pre_activations[0, 0], 1 + torch.arange(8) / 1024)


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first use of forward mode
def test_forward_mode_derivatives_are_refused(place):
    inputs = list(problem(2))
    tangent = torch.ones_like(inputs[place])

    def y(changed):
        return expert_mlp(*inputs[:place], changed, *inputs[place + 1 :], "gelu")

    with pytest.raises(InputError, match="expert_mlp has no forward-mode derivative"):
        torch.func.jvp(y, (inputs[place],), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[place], tangent)
        with pytest.raises(InputError, match="expert_mlp has no forward-mode derivative"):
            y(dual)
        y(inputs[place])  # without a tangent


@pytest.mark.parametrize("sparse", [True, False])
def test_a_frozen_table_costs_no_gradient(sparse, monkeypatch):
    x, experts, ids, weights = problem(2)
    expected = []
    for frozen in (False, True):
        leaves = [x.clone().requires_grad_(), experts.clone().requires_grad_(not frozen), weights.clone()]
        leaves[2].requires_grad_()
        if frozen:
            monkeypatch.setattr(portable, "gradient_rows", None)
            monkeypatch.setattr(cpu, "find_touched_rows", None)
        expert_mlp(leaves[0], leaves[1], ids, leaves[2], "gelu", sparse=sparse).square().sum().backward()
        expected.append((leaves[0].grad, leaves[2].grad))
        assert (leaves[1].grad is None) == frozen
    assert torch.equal(expected[0][0], expected[1][0])
    assert torch.equal(expected[0][1], expected[1][1])


@pytest.mark.parametrize(("num_vectors", "activation"), CASES)
@pytest.mark.parametrize(("num_tokens", "model_dim", "retrieved"), [(5, 7, 6), (0, 5, 3), (9, 200, 11), (3, 64, 4)])
def test_int8_tables_equal_their_scaled_values(num_vectors, activation, num_tokens, model_dim, retrieved):
    sizes = {"num_tokens": num_tokens, "model_dim": model_dim, "retrieved": retrieved}
    x, experts, ids, weights = problem(num_vectors, num_experts=300, **sizes)
    table, scales = quantize_vectors(experts)
    results = []
    for values, options in ((table, {"scales": scales}), (table.double() * scales.double().unsqueeze(-1), {})):
        wide = values.dtype == torch.float64
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, weights)]
        function = (lambda *a: reference.expert_mlp(*a)[0]) if wide else expert_mlp
        y = function(leaves[0], values, ids, leaves[1], activation, **options)
        gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append([t.double() for t in (y, *gradients)])
    for got, expected in zip(*results, strict=True):
        atol = 1e-5 * max(1, expected.abs().max().item() if expected.numel() else 1)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol)


def test_int8_opcheck():
    x, experts, ids, weights = problem(2)
    leaves = x.requires_grad_(), weights.requires_grad_()
    table, scales = quantize_vectors(experts)
    torch.library.opcheck(torch.ops.tinyexperts.expert_mlp, (leaves[0], table, ids, leaves[1], "gelu", scales, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quantised_vectors_are_within_half_a_level(dtype, monkeypatch):
    monkeypatch.setattr(int8, "_CHUNK_ELEMENTS", 100)
    experts = (torch.randn(50, 2, 33, generator=torch.Generator().manual_seed(0)) ** 3).to(dtype)
    experts[3, 1] = 0
    experts[4, 0] = 1e-44  # fp32's smallest numbers: divided by 127 nothing is left
    table, scales = quantize_vectors(experts)
    assert (table.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (50, 2))
    difference = (table.double() * scales.double().unsqueeze(-1) - experts.double()).abs()
    assert (difference <= scales.double().unsqueeze(-1) * 0.501 + 1e-44).all()
    largest = table.abs().amax(-1)
    assert largest[3, 1] == 0
    assert (largest[5:] == 127).all()


def test_a_table_of_no_experts_is_quantized():
    table, scales = quantize_vectors(torch.empty(0, 2, 5))
    assert (table.shape, scales.shape) == ((0, 2, 5), (0, 2))


@pytest.mark.parametrize(
    ("dtype", "scales", "message"),
    [
        (torch.int8, None, "scales are for int8 and uint8 tables and only there, got torch.int8 without scales"),
        (torch.float32, torch.ones(23, 2), "int8 and uint8 tables and only there, got torch.float32 with scales"),
        (torch.int8, torch.ones(23, 1), r"floats \[N, E\] = \[23, 2\], got torch.float32 \[23, 1\]"),
        (torch.int8, torch.ones(23, 2, dtype=torch.int8), r"floats \[N, E\] = \[23, 2\], got torch.int8 \[23, 2\]"),
        (torch.int32, None, r"floating-point type, int8 or uint8 \(4 bits\), got torch.int32"),
    ],
)
def test_scales_are_for_int8_tables(dtype, scales, message):
    x, experts, ids, weights = problem(2)
    with pytest.raises(InputError, match=message):
        expert_mlp(x, experts.to(dtype), ids, weights, "gelu", scales=scales)
