"""expert_mlp with tables in int8 and in 4 bits: against fp64 at odd sizes, and what the rounding may lose."""

from __future__ import annotations

import pytest
import torch
from operands import assert_equal, problem, randn

from tinyexperts.bench.measurement import torch_threads
from tinyexperts.errors import InputError
from tinyexperts.ops import expert_mlp, quantize_groups, quantize_vectors
from tinyexperts.ops.expert_mlp import cpu, int4, int8, portable, reference
from tinyexperts.ops.without_kernels import without_kernels

QUANTIZE = {8: quantize_vectors, 4: quantize_groups}
CASES = [(1, None), *((e, a) for e in (2, 3) for a in ("gelu", "relu", "relu2", "silu"))]
WIDTHS = [1, 2, 7, 16, 31, 32, 33, 47, 48, 63, 64, 65, 100, 127, 128, 129, 200, 257]

both_implementations = pytest.mark.usefixtures("kernels")
each_kind = pytest.mark.parametrize("bits", [8, 4])


def numbers(table, scales, dim):
    """The table's numbers in fp64, by the reference."""
    return reference.numbers_of(table, scales, dim, torch.float64)


def results(x, table, ids, weights, activation, scales):
    """The output and the gradients of x and of the router weights; in fp64 those of the reference."""
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    if table.dtype == torch.float64:
        y, _ = reference.expert_mlp(leaves[0], table, ids, leaves[1], activation)
    else:
        y = expert_mlp(leaves[0], table, ids, leaves[1], activation, scales=scales)
    grad_y = randn(*x.shape, seed=6, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y, allow_unused=True, materialize_grads=True)]


def assert_close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        atol = tolerance * max(1, b.abs().max().item() if b.numel() else 1)
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=atol)


def assert_equals_its_numbers(bits, num_vectors, activation, *, dtype=torch.float32, tolerance=1e-5, **sizes):
    x, experts, ids, weights = problem(num_vectors, dtype=torch.float64, **sizes)
    ids[:, ids.shape[1] // 2 :] = ids[:, : ids.shape[1] - ids.shape[1] // 2]  # experts that repeat
    table, scales = QUANTIZE[bits](experts)
    narrow = x.to(dtype), weights.to(dtype)
    got = results(narrow[0], table, ids, narrow[1], activation, scales)
    assert {t.dtype for t in got} == {dtype}
    wide = narrow[0].double(), numbers(table, scales, x.shape[1]), ids, narrow[1].double()
    assert_close(got, results(*wide, activation, None), tolerance)


@both_implementations
@each_kind
@pytest.mark.parametrize("model_dim", WIDTHS)
def test_it_equals_the_formula_at_every_width(bits, model_dim):
    for num_vectors, activation in ((1, None), (2, "gelu"), (3, "silu")):
        sizes = {"num_tokens": 5, "model_dim": model_dim, "retrieved": 7}
        assert_equals_its_numbers(bits, num_vectors, activation, **sizes)


@both_implementations
@each_kind
@pytest.mark.parametrize(("num_vectors", "activation"), CASES)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "retrieved"), [(1, 1, 1), (0, 5, 3), (3, 7, 0), (9, 1, 8), (4, 300, 13)]
)
def test_it_equals_the_formula_for_every_activation(bits, num_vectors, activation, num_tokens, num_experts, retrieved):
    sizes = {"num_tokens": num_tokens, "num_experts": num_experts, "retrieved": retrieved}
    assert_equals_its_numbers(bits, num_vectors, activation, model_dim=45, **sizes)


@both_implementations
@each_kind
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_tokens_of_any_type_are_summed_in_fp32_or_wider(bits, dtype, tolerance):
    for num_vectors, activation in ((1, None), (2, "gelu"), (3, "silu")):
        sizes = {"num_tokens": 9, "model_dim": 77, "retrieved": 9}
        assert_equals_its_numbers(bits, num_vectors, activation, dtype=dtype, tolerance=tolerance, **sizes)


@both_implementations
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float64))],
)
def test_scales_of_groups_are_read_in_any_type(dtype):
    x, experts, ids, weights = problem(2, model_dim=70)
    table, scales = quantize_groups(experts)
    scales = (scales.double() * 1.001).to(dtype)
    for tokens in (x, x.double()):
        got = results(tokens, table, ids, weights.to(tokens.dtype), "gelu", scales)
        wide = x.double(), numbers(table, scales, 70), ids, weights.double()
        assert_close(got, results(*wide, "gelu", None))


@each_kind
def test_the_kernel_and_the_portable_operator_agree_in_chunks(bits, monkeypatch):
    monkeypatch.setattr(portable, "_CHUNK_ELEMENTS", 4000)
    x, experts, ids, weights = problem(3, num_tokens=63, num_experts=400, model_dim=100, retrieved=21)
    table, scales = QUANTIZE[bits](experts)
    by_kernel = results(x, table, ids, weights, "gelu", scales)
    with without_kernels():
        assert_close(results(x, table, ids, weights, "gelu", scales), by_kernel)


def test_no_more_numbers_are_made_of_codes_than_a_chunk_holds(monkeypatch):
    made, unpack = [], portable.unpack_groups
    monkeypatch.setattr(portable, "_CHUNK_ELEMENTS", 4000)
    monkeypatch.setattr(portable, "unpack_groups", lambda *a: made.append(a[2].numel()) or unpack(*a))
    x, experts, ids, weights = problem(2, num_tokens=100, model_dim=16, retrieved=8)
    table, scales = quantize_groups(experts)
    with without_kernels():
        results(x, table, ids, weights, "gelu", scales)
    assert sum(made) == 2 * 100 * 8 * 2 * 16  # once forward, once backward
    assert max(made) <= 4000


@each_kind
def test_bit_equal_for_any_number_of_threads(bits):
    x, experts, ids, weights = problem(2, num_tokens=131, num_experts=4096, model_dim=64, retrieved=32)
    table, scales = QUANTIZE[bits](experts)
    found = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            found.append(results(x, table, ids, weights, "gelu", scales))
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


def strided(tensor):
    """The same values, in every other place of a larger tensor."""
    room = torch.full([2 * size for size in tensor.shape], 77).to(tensor.dtype)
    view = room[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view


@both_implementations
@each_kind
@pytest.mark.parametrize("which", [0, 1, 2, 3, 4])
def test_operands_that_are_not_contiguous_equal_contiguous_ones(bits, which, kernels):
    x, experts, ids, weights = problem(2, num_tokens=9, num_experts=50, model_dim=77, retrieved=6)
    table, scales = QUANTIZE[bits](experts)
    operands = [x, table, ids, weights, scales]
    expected = results(*operands[:4], "gelu", scales)
    operands[which] = strided(operands[which])
    found = results(*operands[:4], "gelu", operands[4])
    if kernels == "triton" and which == 1:  # its kernels take contiguous tables only: this one goes to plain torch
        assert_close(found, expected, 1e-6)
    else:
        assert_equal(found, expected)


@both_implementations
@pytest.mark.parametrize(("num_vectors", "activation"), [(1, None), (2, "gelu"), (3, "silu")])
def test_opcheck(num_vectors, activation):
    x, experts, ids, weights = problem(num_vectors, model_dim=45)
    table, scales = quantize_groups(experts)
    _, pre = torch.ops.tinyexperts.expert_mlp(x, table, ids, weights, activation, scales, False)
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    forward = (leaves[0], table, ids, leaves[1], activation, scales, False)
    torch.library.opcheck(torch.ops.tinyexperts.expert_mlp, forward)
    backward = (torch.randn_like(x), x, table, ids, weights, pre, activation, scales)
    torch.library.opcheck(torch.ops.tinyexperts.expert_mlp_backward, backward)


@each_kind
def test_a_graph_of_torch_compile_gives_the_same(bits):
    x, experts, ids, weights = problem(2, model_dim=45)
    table, scales = QUANTIZE[bits](experts)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, weights):
        return expert_mlp(x, table, ids, weights, "gelu", scales=scales)

    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    y = compiled(*leaves)
    y.backward(randn(*x.shape, seed=6))
    got = [y.detach(), *(leaf.grad for leaf in leaves)]
    assert_close(got, results(x, table, ids, weights, "gelu", scales), 1e-6)


def test_every_code_is_read_exactly():
    # 256 bytes hold each pair of codes: one whole group a vector, and a shorter one behind it.
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    table = torch.stack([codes.roll(-i) for i in range(16 + 3)], dim=1).unsqueeze(1)
    scales = torch.ones(256, 1, 2, dtype=torch.bfloat16)
    scales[:, :, 1] = -3
    ids, x = torch.arange(256)[:, None], torch.zeros(256, 38)
    y = expert_mlp(x, table, ids, torch.ones(256, 1), None, scales=scales)
    low, high = (codes & 15).float() - 8, (codes >> 4).float() - 8
    expected = [low.roll(-i) for i in range(16)] + [high.roll(-i) for i in range(16)]
    expected += [-3 * half.roll(-16 - i) for half in (low, high) for i in range(3)]
    assert torch.equal(y, torch.stack(expected, dim=1))
    assert torch.equal(numbers(table, scales, 38)[:, 0].float(), y)


def test_codes_lie_as_documented():
    # One group of 32 and one of 3; the largest of each is negative, so that it takes the level -8 or near.
    vector = torch.cat([torch.arange(-16, 16) / 2.0, torch.tensor([-8.0, 4.0, 1.0])])
    table, scales = quantize_groups(vector.view(1, 1, -1))
    assert (table.dtype, table.shape) == (torch.uint8, (1, 1, 18))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (1, 1, 2))
    assert scales[0, 0, 1] == 1
    assert table[0, 0, 16:].tolist() == [(9 << 4) | 0, 12]  # -8 and 1; 4, and nothing


def relative_error(table, scales, experts):
    difference = numbers(table, scales, experts.shape[2]) - experts.double()
    return float(difference.square().mean().sqrt() / experts.double().square().mean().sqrt())


def symmetric(experts, group):
    """The numbers of a table rounded to the levels -7 to 7, between the extremes of each group."""
    groups = torch.nn.functional.pad(experts, (0, -experts.shape[2] % group)).unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    levels = (groups / torch.where(scales > 0, scales, 1)).round().clamp(-7, 7)
    return (levels * scales).flatten(-2)[..., : experts.shape[2]]


def test_the_rounding_loses_what_is_documented():
    experts = randn(2000, 2, 256)
    assert relative_error(*quantize_vectors(experts), experts) < 0.008
    found = relative_error(*quantize_groups(experts), experts)
    assert 0.080 < found < 0.085
    plain = symmetric(experts, int4.GROUP) - experts
    assert found < 0.87 * float(plain.square().mean().sqrt() / experts.square().mean().sqrt())


@pytest.mark.parametrize("dim", [1, 5, 32, 50, 96])
def test_no_group_is_worse_than_with_symmetric_levels(dim, monkeypatch):
    monkeypatch.setattr(int4, "_CHUNK_ELEMENTS", 100)
    experts = randn(300, 2, dim) ** 3
    table, scales = quantize_groups(experts)
    assert table.shape == (300, 2, -(-dim // 2))
    assert scales.shape == (300, 2, -(-dim // 32))

    def errors(numbers):
        return torch.stack([part.square().sum(-1) for part in (numbers.double() - experts).split(32, dim=-1)])

    ours, plain = errors(numbers(table, scales, dim)), errors(symmetric(experts, 32))
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < plain.sum()


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_tables_are_rounded(bits, dtype):
    experts = randn(40, 2, 50).to(dtype)
    experts[0] = 0
    experts[1, 0, 3] = 3e38  # its square is no number
    experts[2] *= 1e-20
    experts[3] *= 1e-30
    experts[4, :, :32] = 1e-44  # smaller than any scale
    experts[5, 1, :] = -2.5
    table, scales = QUANTIZE[bits](experts)
    found = numbers(table, scales, 50)
    assert found.isfinite().all()
    assert not found[0].any()
    for row in (1, 2, 3, 5):
        assert_close(found[row] / experts[row].double().abs().max(), experts[row] / experts[row].abs().max(), 0.08)
    assert found[4, :, :32].abs().max() <= 1e-44
    x, ids = torch.zeros(40, 50), torch.arange(40)[:, None]
    y = expert_mlp(x, table[:, :1], ids, torch.ones(40, 1), None, scales=scales[:, :1])
    assert torch.equal(y, found[:, 0].float())


@each_kind
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [(0, 0, 0), (6, 1, 49)])
def test_a_table_that_is_not_finite_is_refused(bits, value, place, monkeypatch):
    for module in (int4, int8):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 200)
    experts = randn(7, 2, 50)
    experts[place] = float(value)
    with pytest.raises(InputError, match=f"a table that is quantized must be finite, got {value}"):
        QUANTIZE[bits](experts)


def test_a_table_of_no_experts_is_quantized():
    table, scales = quantize_groups(torch.empty(0, 2, 5))
    assert (table.shape, scales.shape) == ((0, 2, 3), (0, 2, 1))
    for implementation in (cpu, portable):
        y, _ = implementation.expert_mlp(
            torch.ones(2, 5), table, torch.empty(2, 0, dtype=torch.int64), torch.ones(2, 0), "relu", scales, False
        )
        assert torch.equal(y, torch.zeros(2, 5))


PACKED = torch.zeros(23, 2, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("table", "scales", "message"),
    [
        (PACKED, None, r"scales are for int8 and uint8 tables and only there, got torch\.uint8 without scales"),
        (PACKED, torch.ones(23, 2), r"floats \[N, E, ceil\(D / 32\)\] = \[23, 2, 1\], got torch\.float32 \[23, 2\]"),
        (PACKED, torch.ones(23, 2, 2), r"= \[23, 2, 1\], got torch\.float32 \[23, 2, 2\]"),
        (PACKED, torch.ones(23, 2, 1).int(), r"= \[23, 2, 1\], got torch\.int32 \[23, 2, 1\]"),
        (PACKED[..., :3], torch.ones(23, 2, 1), r"D = 6 or 5 for 3 bytes of 4 bits each, got \[5, 7\]"),
        (torch.zeros(23, 2, 7, dtype=torch.int8), torch.ones(23, 2, 1), r"\[N, E\] = \[23, 2\], got .* \[23, 2, 1\]"),
        (torch.zeros(23, 2, 7, dtype=torch.int16), None, r"int8 or uint8 \(4 bits\), got torch\.int16"),
    ],
)
def test_operands_that_do_not_fit_are_refused(table, scales, message):
    x, _, ids, weights = problem(2)
    with pytest.raises(InputError, match=message):
        expert_mlp(x, table, ids, weights, "gelu", scales=scales)
