"""The operators and layers give the same bits under autocast and activation checkpointing, and shapes on meta."""

from __future__ import annotations

import pytest
import torch
from operands import assert_equal, layer_results, make_small_layer, operator_results, problem, randn
from torch.utils.checkpoint import checkpoint

from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.layers import product_key_layer, product_key_router
from tinyexperts.ops.expert_mlp import cpu as expert_cpu
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.ops.product_key_topk import cpu as topk_cpu
from tinyexperts.optim import RowSparseAdam, deferred_gradients

ACTIVATIONS = [(1, None), (2, "gelu"), (2, "relu"), (2, "relu2"), (2, "silu"), (3, "gelu"), (3, "silu")]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("num_vectors", "activation"), ACTIVATIONS)
def test_autocast_changes_no_bit_of_expert_mlp_and_its_gradients(num_vectors, activation):
    inputs = problem(num_vectors, num_tokens=9, num_experts=50, model_dim=33, retrieved=6)
    expected = operator_results(inputs, activation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = operator_results(inputs, activation)
    assert_equal(got, expected)


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
def test_autocast_around_a_layer_changes_no_bit_of_its_operators(kind, monkeypatch):
    calls = []

    def recorded(module, name):
        function = getattr(module, name)

        def call(*arguments, **options):
            result = function(*arguments, **options)
            calls.append((function, arguments, options, result))
            return result

        monkeypatch.setattr(module, name, call)

    recorded(product_key_router, "product_key_topk")
    recorded(product_key_layer, "expert_mlp")
    layer = make_small_layer(kind, sparse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(randn(9, 32))
    assert len(calls) == 2
    assert calls[0][1][0].dtype == torch.bfloat16, "autocast was on: the query network's output is narrow"
    assert calls[0][3][0].dtype == torch.float32, "scores are not"
    for function, arguments, options, result in calls:
        expected = function(*arguments, **options)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (result, expected)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
def test_a_fused_step_after_autocast_equals_the_one_without_it_to_the_bit(kind):
    results = []
    for fused in (False, True):
        layer = make_small_layer(kind, sparse=True)
        optimizer = RowSparseAdam([layer.experts], lr=0.1, fused=fused)
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = layer(randn(40, 32, seed=step, dtype=torch.bfloat16).requires_grad_())
            assert y.dtype == torch.bfloat16
            with deferred_gradients([optimizer]):
                y.float().square().sum().backward()
            assert (pending_gradient(layer.experts.grad) is not None) == fused
            optimizer.step()
            optimizer.zero_grad()
        results.append([layer.experts.detach(), *optimizer.state[layer.experts].values()])
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_fused_step_under_activation_checkpointing_gives_the_same_weights(kind, use_reentrant, passes):
    def run(forward):
        layer = make_small_layer(kind, sparse=True)
        optimizer = RowSparseAdam([layer.experts], lr=0.1, fused=True)
        rest = torch.optim.SGD(layer.router.parameters(), lr=0.1)
        for step in range(3):
            for micro_batch in range(passes):
                leaf = randn(40, 32, seed=2 * step + micro_batch).requires_grad_()
                with deferred_gradients([optimizer]):
                    forward(layer, leaf).square().sum().backward()
            assert (pending_gradient(layer.experts.grad) is not None) == (passes == 1)
            for chosen in (optimizer, rest):
                chosen.step()
                chosen.zero_grad()
        return [*layer.state_dict().values(), *optimizer.state[layer.experts].values()]

    expected = run(lambda layer, x: layer(x))
    assert not torch.equal(expected[0], run(lambda layer, x: layer(x) * 2)[0])
    assert_equal(run(lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant)), expected)


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_layer_on_meta_has_shapes_and_calls_no_kernel(kind, sparse, monkeypatch):
    def called(*arguments, **options):
        raise AssertionError("a kernel was called")

    with monkeypatch.context() as patch:
        for module in (expert_cpu, topk_cpu):
            patch.setattr(module, "parallel_for", called)
        large = kind(1024, 1024**2, sparse=sparse, device="meta")  # 4 or 8 GiB, were it anywhere
        for x in (torch.empty(3, 5, 1024, device="meta"), torch.empty(0, 1024, device="meta")):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    y = large(x)
                assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.float32, "meta")
                routing = large.route(x)
                assert routing.ids.shape == routing.scores.shape == (*x.shape[:-1], *routing.ids.shape[-2:])
        with pytest.raises(AssertionError, match="a kernel was called"):
            make_small_layer(kind)(randn(9, 32))
    layer, twin = (
        make_small_layer(kind, sparse=sparse, device="meta").to_empty(device="cpu"),
        make_small_layer(kind, sparse=sparse),
    )
    for module in (layer, twin):
        module.reset_parameters(torch.Generator().manual_seed(7))
    x = randn(9, 32)
    assert_equal(layer_results(layer, x), layer_results(twin, x))
    assert layer(x).isfinite().all()
    assert layer(x).any()
