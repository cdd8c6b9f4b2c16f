"""What PyTorch promises of `.grad` holds for a table that a fused optimizer trains, outside and inside the scope."""

from __future__ import annotations

import copy
import gc
import io
import threading
from contextlib import nullcontext, suppress

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.errors import InputError
from tinyexperts.ops import expert_mlp
from tinyexperts.ops.expert_mlp.deferred import DeferredGradient, pending_gradient
from tinyexperts.optim import RowSparseAdam, build_optimizers, clip_gradient_norm_, deferred_gradients

PLACES = ["outside", "inside"]


def make(kind=PEER, sparse=True, dtype=torch.float64):
    torch.manual_seed(0)
    options = {"experts_per_head": 4}
    return kind(32, 64, num_heads=2, query_dim=8, sparse=sparse, dtype=dtype, **options)


def tokens(seed=1):
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def scope(place, optimizer):
    return deferred_gradients([optimizer]) if place == "inside" else nullcontext()


def expected_gradient(*losses, kind=PEER):
    """The table's gradient of the sum of some losses, by a layer with dense gradients that nothing else touches."""
    layer = make(kind, sparse=False)
    return torch.autograd.grad(sum(loss(layer) for loss in losses), layer.experts)[0]


def loss_of(seed=1, factor=1.0):
    return lambda layer: layer(tokens(seed)).square().sum() * factor


def assert_gradient(layer, expected):
    torch.testing.assert_close(layer.experts.grad.to_dense(), expected, rtol=1e-12, atol=1e-12)


def moved(layer):
    return (layer.experts.detach() != make().experts).flatten(1).any(1)


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
def test_a_backward_pass_leaves_the_gradient_in_grad(place, kind):
    layer = make(kind)
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        loss_of()(layer).backward()
    assert (pending_gradient(layer.experts.grad) is not None) == (place == "inside")
    assert layer.experts.grad.layout == torch.sparse_coo
    assert layer.experts.grad.is_sparse
    assert layer.experts.grad.dtype == torch.float64
    assert_gradient(layer, expected_gradient(loss_of(), kind=kind))
    assert pending_gradient(layer.experts.grad) is None, "reading has written it out"
    assert_gradient(layer, expected_gradient(loss_of(), kind=kind))


def test_a_gradient_for_the_tokens_alone_moves_no_row(place):
    layer, x = make(), tokens()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        torch.autograd.grad(layer(x).square().sum(), x)
        layer(x).square().sum().backward(inputs=[x])
        layer(x).square().sum().backward(inputs=[layer.router.sub_keys])
    assert layer.experts.grad is None
    optimizer.step()
    assert not moved(layer).any()


def test_a_gradient_that_is_returned_is_not_accumulated(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    x = tokens()
    with scope(place, optimizer):
        gradients = torch.autograd.grad(layer(x).square().sum(), [layer.experts, x])
        alone = torch.autograd.grad(layer(x).square().sum(), layer.experts)[0]
    for gradient in (gradients[0], alone):
        torch.testing.assert_close(gradient.to_dense(), expected_gradient(loss_of()), rtol=1e-12, atol=1e-12)
    assert layer.experts.grad is None
    optimizer.step()
    assert not moved(layer).any()


def test_inputs_that_name_the_table_are_trained_alone(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        loss_of()(layer).backward(inputs=[layer.experts])
    assert layer.router.sub_keys.grad is None
    assert_gradient(layer, expected_gradient(loss_of()))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["layer", "optimizer", "hand"])
def test_zero_grad_forgets_a_gradient_that_is_not_finite(place, set_to_none, by):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        loss_of(factor=float("nan"))(layer).backward()
        if by == "hand":
            layer.experts.grad = None
        else:
            {"layer": layer, "optimizer": optimizer}[by].zero_grad(set_to_none=set_to_none)
        loss_of(seed=2)(layer).backward()
    assert_gradient(layer, expected_gradient(loss_of(seed=2)))
    optimizer.step()
    assert layer.experts.isfinite().all()


def test_passes_accumulate_in_place_and_over_the_end_of_the_scope(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        loss_of(seed=1)(layer).backward()
        loss_of(seed=2)(layer).backward()
    held = layer.experts.grad
    loss_of(seed=3)(layer).backward()
    with scope(place, optimizer):
        loss_of(seed=4)(layer).backward()
    assert layer.experts.grad is held
    assert_gradient(layer, expected_gradient(*(loss_of(seed) for seed in (1, 2, 3, 4))))


def test_a_deferred_gradient_is_added_to_a_dense_one(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    layer.experts.grad = torch.ones_like(layer.experts)
    with scope(place, optimizer):
        loss_of()(layer).backward()
    torch.testing.assert_close(layer.experts.grad.detach(), expected_gradient(loss_of()) + 1)


def test_a_table_that_is_used_several_times_in_one_graph(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        (loss_of(seed=1)(layer) + loss_of(seed=2)(layer)).backward()
    assert_gradient(layer, expected_gradient(loss_of(seed=1), loss_of(seed=2)))
    layer.zero_grad()
    with scope(place, optimizer):  # by an operation that knows nothing of tables, too
        (loss_of(seed=1)(layer) + layer.experts.square().sum()).backward()
    expected = expected_gradient(loss_of(seed=1), lambda layer: layer.experts.square().sum())
    assert_gradient(layer, expected)


def test_a_graph_that_is_kept_gives_its_gradient_again(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    loss = loss_of()(layer)
    with scope(place, optimizer):
        loss.backward(retain_graph=True)
        loss.backward()
    assert_gradient(layer, 2 * expected_gradient(loss_of()))


def test_a_frozen_table_has_no_gradient_and_a_thawed_one_has(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    loss = loss_of()(layer)
    layer.experts.requires_grad_(False)  # between the passes: autograd adds nothing to it any more
    with scope(place, optimizer):
        loss.backward()
        loss_of()(layer).backward()
    assert layer.experts.grad is None
    layer.experts.requires_grad_(True)
    with scope(place, optimizer):
        loss_of()(layer).backward()
    assert_gradient(layer, expected_gradient(loss_of()))


def test_what_is_changed_in_place_after_the_backward_pass_changes_no_gradient(place):
    layer, x, grad_y = make(), tokens(), torch.randn(7, 32, dtype=torch.float64)
    optimizer = RowSparseAdam([layer.experts], fused=True)
    twin = make(sparse=False)
    twin(tokens()).backward(grad_y)
    with scope(place, optimizer):
        layer(x).backward(grad_y)
    with torch.no_grad():
        x.fill_(1e9)
        grad_y.fill_(1e9)
    assert_gradient(layer, twin.experts.grad)


def test_hooks_see_the_gradient_outside_and_raise_inside():
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    seen = []
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        layer.zero_grad()
        handle = getattr(layer.experts, register)(lambda tensor: seen.append(tensor))
        loss_of()(layer).backward()
        assert len(seen) == 1
        assert_gradient(layer, expected_gradient(loss_of()))
        with pytest.raises(InputError, match="a deferred gradient passes no hook"), deferred_gradients([optimizer]):
            pass
        handle.remove()
        with deferred_gradients([optimizer]):
            handle = getattr(layer.experts, register)(lambda tensor: seen.append(tensor))
            with pytest.raises(InputError, match="a deferred gradient passes no hook"):
                loss_of()(layer).backward()
        handle.remove()
        seen.clear()


def test_a_dense_layer_and_a_table_that_is_no_leaf_raise():
    layer = make(sparse=False)
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with deferred_gradients([optimizer]), pytest.raises(InputError, match="make it with sparse=True"):
        loss_of()(layer).backward()
    loss_of()(layer).backward()
    torch.testing.assert_close(layer.experts.grad, expected_gradient(loss_of()))
    optimizer = RowSparseAdam([layer.experts], fused=True)
    layer.half()
    with pytest.raises(InputError, match=r"got torch.float16 on cpu"), deferred_gradients([optimizer]):
        pass


def test_the_scope_ends_where_its_block_ends_and_scopes_nest():
    first, second = make(), make(ProductKeyMemory)
    optimizers = [RowSparseAdam([layer.experts], fused=True) for layer in (first, second)]

    def kinds():
        for layer in (first, second):
            layer.zero_grad()
            loss_of()(layer).backward()
        return [pending_gradient(layer.experts.grad) is not None for layer in (first, second)]

    with deferred_gradients(optimizers[:1]):
        assert kinds() == [True, False]
        with suppress(KeyError), deferred_gradients(optimizers[1:]):
            assert kinds() == [True, True]
            raise KeyError
        assert kinds() == [True, False]
        thread_kinds = []
        thread = threading.Thread(target=lambda: thread_kinds.extend(kinds()))
        thread.start()
        thread.join()
        assert thread_kinds == [False, False]
    assert kinds() == [False, False]
    with deferred_gradients([RowSparseAdam([first.experts]), torch.optim.SGD(second.parameters(), lr=1.0)]):
        assert kinds() == [False, False]


def test_an_optimizer_made_after_the_fused_one_trains_the_table(place):
    layer, twin = make(), make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        loss_of()(layer).backward()
    del optimizer
    gc.collect()
    loss_of()(twin).backward()
    for each in (layer, twin):
        torch.optim.SparseAdam([each.experts], lr=1e-2).step()
    assert torch.equal(layer.experts, twin.experts)
    assert moved(layer).any()


def test_a_copy_and_a_layer_from_disk_train_by_themselves(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        loss_of()(layer).backward()
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twins = [copy.deepcopy(layer), torch.load(file, weights_only=False)]
        for twin in twins:
            assert twin.experts.grad is None
            loss_of(seed=2)(twin).backward()
            assert_gradient(twin, expected_gradient(loss_of(seed=2)))
            twin.sparse = False
            twin.zero_grad()
            other = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
            loss_of(seed=2)(twin).backward()
            other.step()
            assert torch.equal(moved(twin), expected_gradient(loss_of(seed=2)).flatten(1).any(1))
    assert_gradient(layer, expected_gradient(loss_of()))


def test_the_gradient_is_copied_and_pickled_as_what_it_is(place):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        loss_of()(layer).backward()
    copied = copy.deepcopy(layer.experts.grad)
    file = io.BytesIO()
    torch.save(layer.experts.grad, file)
    file.seek(0)
    for gradient in (copied, torch.load(file), layer.experts.grad.clone(), layer.experts.grad.detach()):
        assert not isinstance(gradient, DeferredGradient)
        torch.testing.assert_close(gradient.to_dense(), expected_gradient(loss_of()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["mul_", "imul", "values"])
def test_a_gradient_that_is_changed_is_the_one_that_is_stepped_on(place, change):
    results = []
    for fused in (True, False):
        layer = make()
        optimizer = RowSparseAdam([layer.experts], lr=0.1, eps=1.0, fused=fused)
        with scope(place, optimizer):
            loss_of()(layer).backward()
            if change == "mul_":
                layer.experts.grad.mul_(0.125)
            elif change == "imul":
                layer.experts.grad *= 0.125
            else:
                layer.experts.grad._values().mul_(0.125)
            norm = clip_gradient_norm_([layer.experts], None)
            optimizer.step()
        results.append((layer.experts.detach(), norm))
    torch.testing.assert_close(results[0][1], (0.125 * expected_gradient(loss_of())).norm())
    assert torch.equal(results[0][0], results[1][0])


def test_a_gradient_scaler_unscales_it(place):
    results = []
    for scaled in (True, False):
        layer = make(dtype=torch.float32)
        optimizer = RowSparseAdam([layer.experts], lr=0.1, eps=1.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        with scope(place, optimizer):
            scaler.scale(layer(tokens().float()).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            scaler.scale(layer(tokens().float()).sum() * float("inf")).backward()
            before = layer.experts.detach().clone()
            if scaled:
                scaler.step(optimizer)
                assert torch.equal(layer.experts, before), "a step that is not finite is skipped"
        results.append(before)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(place, use_reentrant):
    layer = make()
    optimizer = RowSparseAdam([layer.experts], fused=True)
    with scope(place, optimizer):
        checkpoint(layer, tokens(), use_reentrant=use_reentrant).square().sum().backward()
    assert (pending_gradient(layer.experts.grad) is not None) == (place == "inside")
    assert_gradient(layer, expected_gradient(loss_of()))


def test_tokens_of_a_wider_type_than_the_tables_are_not_deferred():
    layer = make(dtype=torch.float32)
    optimizer = RowSparseAdam([layer.experts], fused=True)
    ids, weights = torch.tensor([[1, 5]] * 7), torch.rand(7, 2, dtype=torch.float64)
    with deferred_gradients([optimizer]):
        expert_mlp(tokens(), layer.experts, ids, weights, "gelu", sparse=True).sum().backward()
    assert pending_gradient(layer.experts.grad) is None
    assert layer.experts.grad.dtype == torch.float32
    assert layer.experts.grad._indices().tolist() == [[1, 5]]


def test_optimizers_of_a_model_are_fused_and_change_nothing_by_themselves():
    model = torch.nn.Sequential(make())
    rates = dict.fromkeys(("matrix_lr", "embedding_lr", "head_lr", "vector_lr", "table_lr"), 0.1)
    optimizers = build_optimizers(model, sparse_tables=True, **rates)
    assert [group["fused"] for group in optimizers[-1].param_groups] == [True]
    x = tokens()
    torch.autograd.grad(model(x).square().sum(), x)
    optimizers[-1].step()
    assert not moved(model[0]).any()
    loss_of()(model).backward()
    assert_gradient(model[0], expected_gradient(loss_of()))
