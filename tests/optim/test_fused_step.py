"""RowSparseAdam(fused=True) on deferred gradients: nothing is written out, and every bit is as without it."""

from __future__ import annotations

import pytest
import torch

from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.bench.measurement import torch_threads
from tinyexperts.errors import InputError
from tinyexperts.ops import row_adam_
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.ops.row_adam.rounding import seed_of_step
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients


def make(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    if kind == "pkm":
        return ProductKeyMemory(40, 49, num_heads=2, experts_per_head=3, query_dim=4, sparse=True).to(dtype)
    return PEER(40, 49, num_heads=2, experts_per_head=3, query_dim=4, gated=kind == "gated", sparse=True).to(dtype)


def run(layer, *, fused, steps=5, passes=1, max_norm=None, second_moment="row", threads=1):
    optimizer = RowSparseAdam([layer.experts], lr=1e-2, weight_decay=0.1, second_moment=second_moment, fused=fused)
    rest = torch.optim.SGD(layer.router.parameters(), lr=1e-2)
    norms, generator = [], torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        rest.zero_grad()
        for _ in range(passes):
            x = torch.randn(300, 40, generator=generator).to(layer.experts.dtype)
            with deferred_gradients([optimizer, rest]):
                layer(x).square().sum().backward()
        assert (pending_gradient(layer.experts.grad) is not None) == (fused and passes == 1)
        with torch_threads(threads):  # for what is tested; torch's own sums in the router may differ
            norms.append(clip_gradient_norm_(layer.parameters(), max_norm) if max_norm else torch.zeros(()))
            optimizer.step()
        assert (pending_gradient(layer.experts.grad) is not None) == (fused and passes == 1), (
            "the step has written nothing out"
        )
        rest.step()
    return [*layer.state_dict().values(), *optimizer.state[layer.experts].values()], torch.stack(norms)


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("kind", ["peer", "gated", "pkm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_step_without_it_to_the_bit(kind, second_moment, dtype):
    plain, _ = run(make(kind, dtype), fused=False, second_moment=second_moment)
    for threads in (1, 2):
        fused, _ = run(make(kind, dtype), fused=True, second_moment=second_moment, threads=threads)
        assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))
    assert not torch.equal(plain[0], make(kind, dtype).state_dict()["experts"])


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("kind", ["peer", "gated", "pkm"])
def test_a_bf16_table_is_updated_by_sums_in_fp32(kind, second_moment, stochastic):
    layer = make(kind)
    layer.experts.data = layer.experts.data.bfloat16()
    options = {"lr": 1e-3, "weight_decay": 0.1, "second_moment": second_moment, "stochastic_rounding": stochastic}
    optimizer = RowSparseAdam([layer.experts], **options, seed=5, fused=True)
    table = layer.experts.detach().clone()
    exp_avg = torch.zeros(table.shape)
    exp_avg_sq = torch.zeros(table.shape[:-1] if second_moment == "row" else table.shape)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 4):
        optimizer.zero_grad()
        with deferred_gradients([optimizer]):
            layer(torch.randn(300, 40, generator=generator)).square().sum().backward()
        rows, values = pending_gradient(layer.experts.grad).rows_and_values()
        assert values.dtype == torch.float32
        seed = seed_of_step(5, 0, step) if stochastic else None
        constants = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        row_adam_(table, exp_avg, exp_avg_sq, rows, values, **constants, step=step, rounding_seed=seed)
        with torch_threads(1 + step % 2):
            optimizer.step()
        assert pending_gradient(layer.experts.grad) is not None
        assert layer.experts.grad.dtype == torch.bfloat16
        for ours, expected in zip(
            (layer.experts, *optimizer.state[layer.experts].values()),
            (table, torch.tensor(step), exp_avg, exp_avg_sq),
            strict=True,
        ):
            assert torch.equal(ours.detach(), expected)


def test_several_backward_passes_are_summed_as_autograd_does():
    plain, _ = run(make("peer"), fused=False, passes=3)
    fused, _ = run(make("peer"), fused=True, passes=3)
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("max_norm", [1.0, 1e9])
def test_clipping_measures_and_scales_what_is_not_written(passes, max_norm):
    plain, norms = run(make("peer", torch.float64), fused=False, max_norm=max_norm, passes=passes)
    fused, fused_norms = run(make("peer", torch.float64), fused=True, max_norm=max_norm, passes=passes)
    torch.testing.assert_close(fused_norms, norms, rtol=1e-12, atol=0)
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_norm_has_the_same_bits_for_any_number_of_threads():
    _, one = run(make("peer"), fused=True, max_norm=1.0, threads=1)
    _, two = run(make("peer"), fused=True, max_norm=1.0, threads=2)
    assert torch.equal(one, two)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loaded_state_leaves_fused_as_it_was_made(fused):
    layer = make("peer")
    other, own = (RowSparseAdam([layer.experts], lr=lr, fused=f) for lr, f in ((0.5, not fused), (0.1, fused)))
    own.load_state_dict(other.state_dict())
    assert (own.param_groups[0]["lr"], own.param_groups[0]["fused"]) == (0.5, fused)
    with deferred_gradients([own]):
        layer(torch.randn(5, 40)).sum().backward()
    assert (pending_gradient(layer.experts.grad) is not None) == fused


def test_tables_that_can_not_be_fused_raise():
    with pytest.raises(InputError, match=r"in fp32, fp64 or bf16, or .*, got torch.float16 on cpu"):
        RowSparseAdam([make("peer", torch.float16).experts], fused=True)
