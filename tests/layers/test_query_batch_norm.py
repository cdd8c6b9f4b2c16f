"""Query batch norm: padding ignored, frozen, cast, without running statistics; else as torch's own."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.layers import DenseFFN, share_query_statistics
from tinyexperts.layers.query_batch_norm import QueryBatchNorm

LENGTHS = (6, 3, 1)


def make(kind="peer", seed=0, **options):
    torch.manual_seed(seed)
    if kind == "peer":
        layer = PEER(12, 49, **({"num_heads": 3, "experts_per_head": 4, "query_dim": 6} | options))
    else:
        layer = ProductKeyMemory(12, 49, **({"num_heads": 3, "experts_per_head": 5, "query_dim": 6} | options))
    if options.get("query_norm", "batch") == "batch":
        with torch.no_grad():  # not as at the start, where a gain of 1 hides what is multiplied by it
            layer.router.norm.weight.uniform_(0.5, 2)
            layer.router.norm.bias.uniform_(-1, 1)
    return layer


def padded(seed=1, dtype=torch.float32, padding=7.0):
    """Three sequences of 6, 3 and 1 tokens, and their mask."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    x = torch.randn(*mask.shape, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[~mask] = padding
    return x, mask


def statistics(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def with_statistics(layer, seed=2):
    """A layer that has seen queries of means and variances far from 0 and 1."""
    norm = layer.router.norm
    generator = torch.Generator().manual_seed(seed)
    norm.running_mean.copy_(torch.randn(18, generator=generator))
    norm.running_var.copy_(torch.rand(18, generator=generator) * 3 + 0.5)
    return layer


def gradients(layer):
    return {name: p.grad.to_dense() if p.grad.is_sparse else p.grad for name, p in layer.named_parameters()}


def assert_statistics_equal(layer, expected, **tolerance):
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    # Both compute in fp32 and round, but a query that is rounded the other way moves what it touches by 2^-8.
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("kind", "options"), [("peer", {}), ("peer", {"sparse": True, "gated": True}), ("pkm", {})])
def test_real_tokens_have_the_outputs_and_gradients_that_they_have_without_padding(kind, options, dtype):
    layer = make(kind, dtype=dtype, **options)
    twin = copy.deepcopy(layer)
    x, mask = padded(dtype=dtype)
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    x_padded, x_alone = x.clone().requires_grad_(), x[mask].clone().requires_grad_()
    for _ in range(2):
        y_padded, y_alone = layer(x_padded, mask), twin(x_alone)
        assert y_padded.shape == x.shape
        assert y_padded.dtype == dtype
        torch.testing.assert_close(y_padded[mask], y_alone, **TOLERANCES[dtype])
    (y_padded[mask] * grad_y[mask]).sum().backward()
    (y_alone * grad_y[mask]).sum().backward()
    torch.testing.assert_close(x_padded.grad[mask], x_alone.grad, **TOLERANCES[dtype])
    assert not x_padded.grad[~mask].any()
    torch.testing.assert_close(gradients(layer), gradients(twin), **TOLERANCES[dtype])
    assert_statistics_equal(layer, statistics(twin), rtol=1e-6, atol=1e-6)
    assert layer.router.norm.num_batches_tracked == 2


def test_statistics_are_those_of_the_real_tokens():
    layer = make()
    x, mask = padded()
    raw = layer.router.query(x[mask])
    routing = layer.route(x, mask)
    assert routing.ids.shape == (3, 6, 3, 4)
    norm = layer.router.norm
    torch.testing.assert_close(norm.running_mean, 0.1 * raw.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * raw.var(0))
    queries = layer.router.queries(x, mask).flatten(1)
    normed = (layer.router.query(x.flatten(0, 1)) - raw.mean(0)) / (raw.var(0, unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(queries, normed * norm.weight + norm.bias, rtol=1e-4, atol=1e-5)


def test_what_padding_holds_is_nothing_to_the_real_tokens():
    outputs = []
    for padding in (0.0, -1e4, torch.inf, torch.nan):
        layer, (x, mask) = make(), padded(padding=padding)
        outputs.append((layer(x, mask)[mask], *layer.buffers()))
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others, strict=True))


@pytest.mark.parametrize("num_real", [0, 1])
@pytest.mark.parametrize("tracked", [True, False])
def test_without_two_real_tokens_running_statistics_are_used_and_stay(num_real, tracked):
    """What a layer without them starts from is a mean of 0 and a variance of 1."""
    layer = with_statistics(make())
    if not tracked:
        reference = make()
        torch.func.replace_all_batch_norm_modules_(layer)
    else:
        reference = layer
    x, mask = padded()
    mask = (torch.arange(18) < num_real).view(3, 6)
    before = statistics(layer)
    leaf = x.clone().requires_grad_()
    y = layer(leaf, mask)
    y.square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(layer).values())
    assert_statistics_equal(layer, before, rtol=0, atol=0)
    torch.testing.assert_close(y, reference.eval()(x))


@pytest.mark.parametrize("query_norm", ["batch", "layer", "layer_halves", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_is_not_used_changes_nothing(query_norm, training):
    layer = make(query_norm=query_norm).train(training)
    twin = copy.deepcopy(layer)
    x, mask = padded()
    if query_norm == "batch" and training:
        mask = torch.ones_like(mask)
        torch.testing.assert_close(layer(x, mask), twin(x))
        assert_statistics_equal(layer, statistics(twin))
    else:
        assert torch.equal(layer(x, mask), twin(x))
        assert torch.equal(layer(x, ~mask), twin(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("of_mask", "message"),
    [
        (lambda mask: mask.long(), r"bool \[3, 6\] on cpu, got int64 \[3, 6\]"),
        (lambda mask: mask.flatten(), r"bool \[3, 6\] on cpu, got bool \[18\]"),
        (lambda mask: mask[..., None], r"got bool \[3, 6, 1\]"),
        (lambda mask: mask.to("meta"), r"bool \[3, 6\] on cpu, got bool \[3, 6\] on meta"),
        (lambda mask: mask.tolist(), "mask must be a bool tensor, True for each real token, got list"),
    ],
)
def test_a_wrong_mask_raises(of_mask, message, training):
    layer = make().train(training)
    x, mask = padded()
    for call in (layer, layer.route, layer.router, layer.router.queries):
        with pytest.raises(ValueError, match=message):
            call(x, of_mask(mask))


class Wrapped(nn.Module):
    """As torch.compile wraps a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return self.inner(*arguments)


def test_a_mask_for_a_norm_that_was_replaced():
    layer = make()
    twin = copy.deepcopy(layer)
    x, mask = padded()
    layer.router.norm = nn.BatchNorm1d(18)
    with pytest.raises(ValueError, match=r"a mask needs the layer's own query batch norm, got .* by BatchNorm1d"):
        layer(x, mask)
    layer.eval()
    assert torch.equal(layer(x, mask), layer(x))
    layer.router.norm = Wrapped(copy.deepcopy(twin.router.norm))
    torch.testing.assert_close(layer.train()(x, mask), twin(x, mask))


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_a_mask_compiles_whole_with_equal_values(kind):
    layer = make(kind)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=False)
    x, mask = padded()
    for each in (mask, ~mask, torch.zeros_like(mask)):
        layer.zero_grad()
        twin.zero_grad()
        y, y_compiled = layer(x, each), compiled(x, each)
        torch.testing.assert_close(y_compiled, y)
        y[each].square().sum().backward()
        y_compiled[each].square().sum().backward()
        torch.testing.assert_close(gradients(twin), gradients(layer))
    assert_statistics_equal(twin, statistics(layer))


def test_a_mask_is_exported():
    layer = make()
    x, mask = padded()
    program = torch.export.export(copy.deepcopy(layer), (x, mask)).module(check_guards=False)
    other, other_mask = padded(seed=5)[0], mask.flip(0)
    for each in (other_mask, torch.zeros_like(mask)):
        torch.testing.assert_close(program(other, each), layer(other, each))
    assert_statistics_equal(program, statistics(layer))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("masked", [True, False])
def test_running_statistics_move_once_under_checkpointing(use_reentrant, momentum, masked):
    plain, checkpointed = make(), make()
    plain.router.norm.momentum = checkpointed.router.norm.momentum = momentum
    for step in range(3):
        x, mask = padded(seed=step)
        arguments = (mask,) if masked else ()
        plain(x, *arguments)[mask].sum().backward()
        leaf = x.clone().requires_grad_()
        checkpoint(checkpointed, leaf, *arguments, use_reentrant=use_reentrant)[mask].sum().backward()
    assert_statistics_equal(checkpointed, statistics(plain), rtol=0, atol=0)
    assert plain.router.norm.num_batches_tracked == 3
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_mask_it_is_the_batch_norm_of_torch_to_the_bit(dtype, momentum):
    norm, reference = QueryBatchNorm(18, momentum=momentum), nn.BatchNorm1d(18, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    results = []
    for module in (norm.to(dtype), reference.to(dtype)):
        generator.manual_seed(0)
        for training in (True, True, False, True):
            leaf = (torch.randn(9, 18, generator=generator, dtype=dtype) * 2 + 1).requires_grad_()
            y = module.train(training)(leaf)
            (y * torch.randn(9, 18, generator=generator, dtype=dtype)).sum().backward()
            results.append((y, leaf.grad))
        results.append((module.weight.grad, module.bias.grad, *module.buffers()))
    half = len(results) // 2
    for ours, theirs in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm.train()(torch.ones(1, 18, dtype=dtype))


def test_the_mean_of_all_batches_is_kept_with_a_mask_too():
    layer = make(dtype=torch.float64)
    norm = layer.router.norm
    norm.momentum = None
    raw = []
    for step in range(4):
        x, mask = padded(seed=step, dtype=torch.float64)
        layer(x, mask if step != 2 else torch.zeros_like(mask))
        if step != 2:
            raw.append(layer.router.query(x[mask]))
    assert norm.num_batches_tracked == 3
    torch.testing.assert_close(norm.running_mean, torch.stack([each.mean(0) for each in raw]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([each.var(0) for each in raw]).mean(0))


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_a_frozen_norm_uses_and_keeps_its_running_statistics(kind):
    layer = with_statistics(make(kind)).requires_grad_(False)
    x, mask = padded()
    before = statistics(layer)
    expected = layer.eval()(x)
    layer.train()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x, mask), expected)
    torch.testing.assert_close(layer(x[:1, :1]), expected[:1, :1])  # one token alone, which batch statistics refuse
    assert torch.equal(layer.route(x).scores, layer.eval().route(x).scores)
    assert_statistics_equal(layer, before, rtol=0, atol=0)


def test_freezing_and_thawing():
    layer, twin = with_statistics(make()), with_statistics(make())
    x, _ = padded()
    layer.requires_grad_(False)
    layer(x)
    layer.requires_grad_(True)
    for module in (layer, twin):
        y = module(x)
        y.square().sum().backward()
    assert torch.equal(layer(x), twin(x))
    torch.testing.assert_close(gradients(layer), gradients(twin), rtol=0, atol=0)
    assert_statistics_equal(layer, statistics(twin), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("frozen", "uses_running"),
    [
        ((), False),
        (("router.norm.weight", "router.norm.bias"), True),
        (("router.norm.weight",), False),
        (("router.norm.bias",), False),
        (("experts", "router.query.weight", "router.sub_keys"), False),
        (("experts", "router.query.weight", "router.sub_keys", "router.norm.weight", "router.norm.bias"), True),
    ],
)
def test_frozen_is_a_norm_whose_own_parameters_all_are(frozen, uses_running):
    layer = with_statistics(make())
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    x, _ = padded()
    before = statistics(layer)
    y = layer(x)
    assert torch.equal(y, layer.eval()(x)) == uses_running
    assert (layer.router.norm.num_batches_tracked == 0) == uses_running
    assert torch.equal(layer.router.norm.running_mean, before["router.norm.running_mean"]) == uses_running


def test_a_norm_without_parameters_is_not_frozen():
    norm = QueryBatchNorm(18, affine=False)
    norm(torch.randn(5, 18))
    assert norm.num_batches_tracked == 1
    x = torch.randn(5, 18)
    mask = torch.arange(5) < 4
    torch.testing.assert_close(norm(x, mask)[:4], norm(x[:4]))


def test_a_frozen_norm_passes_gradients_as_in_evaluation():
    layer = with_statistics(make())
    layer.router.norm.requires_grad_(False)
    grads = []
    for training in (True, False):
        layer.train(training).zero_grad()
        leaf = padded()[0].requires_grad_()
        layer(leaf).square().sum().backward()
        grads.append((leaf.grad, layer.router.query.weight.grad.clone(), layer.experts.grad.clone()))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_a_compiled_layer_follows_freezing_and_thawing():
    layer = with_statistics(make())
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x, _ = padded()
    for trains in (True, False, True):
        layer.router.norm.requires_grad_(trains)
        twin.router.norm.requires_grad_(trains)
        torch.testing.assert_close(compiled(x), layer(x))
        assert_statistics_equal(twin, statistics(layer))
    assert layer.router.norm.num_batches_tracked == 2


CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "to": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "type": lambda module: module.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_cast_and_the_cast_back_keep_the_statistics_to_the_bit(cast, nested, wide):
    layer = make().to(wide)
    x = torch.randn(64, 12, dtype=wide) * 3 + 1
    layer(x)
    before = statistics(layer)
    module = nn.Sequential(nn.Linear(12, 12, dtype=wide), nn.Sequential(layer)) if nested else layer
    CASTS[cast](module)
    assert layer.experts.dtype in (torch.bfloat16, torch.float16)
    assert_statistics_equal(layer, before, rtol=0, atol=0)
    for training in (True, False):
        y = module.train(training)(x.to(layer.experts.dtype))
        assert y.dtype == layer.experts.dtype
        y.sum().backward()
        assert layer.router.norm.weight.grad.dtype == y.dtype
    assert layer.router.norm.num_batches_tracked == 2
    after = statistics(layer)
    module.to(wide)
    assert_statistics_equal(layer, after, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_layer_is_normalised_by_fp32_statistics(dtype):
    layer = with_statistics(make()).to(dtype)
    norm = layer.router.norm
    x = torch.randn(64, 12).to(dtype) * 3 + 1
    raw = layer.router.query(x).float()
    mean, var = with_statistics(make()).router.norm.running_mean, with_statistics(make()).router.norm.running_var
    expected = (raw - mean) / (var + norm.eps).sqrt() * norm.weight.float() + norm.bias.float()
    assert torch.equal(layer.eval().router.queries(x).flatten(1), expected.to(dtype)) or torch.allclose(
        layer.router.queries(x).flatten(1).float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3
    )
    layer.train()
    for step in range(1, 40):
        layer.router.queries(x, torch.ones(64, dtype=torch.bool) if step % 2 else None)
        mean, var = 0.9 * mean + 0.1 * raw.mean(0), 0.9 * var + 0.1 * raw.var(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)


def test_statistics_of_a_layer_made_in_few_bits_are_of_fp32():
    made = [make(dtype=torch.bfloat16), make(dtype=torch.float16), make(dtype=torch.bfloat16, device="meta")]
    torch.set_default_dtype(torch.bfloat16)
    try:
        made.append(make())
    finally:
        torch.set_default_dtype(torch.float32)
    made.append(make(device="meta").bfloat16().to_empty(device="cpu"))
    for layer in made:
        assert layer.experts.dtype in (torch.bfloat16, torch.float16)
        assert layer.router.norm.running_mean.dtype == layer.router.norm.running_var.dtype == torch.float32
    for layer in (make(dtype=torch.float64), make().double(), make().to(torch.float64), make().bfloat16().double()):
        assert layer.router.norm.running_mean.dtype == layer.router.norm.running_var.dtype == torch.float64
    assert make().double().float().router.norm.running_var.dtype == torch.float32
    x = torch.randn(30, 12).bfloat16()
    made[0](x)
    torch.testing.assert_close(
        made[0].router.norm.running_mean, 0.1 * made[0].router.query(x).float().mean(0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("assign", "device"), [(False, "cpu"), (True, "cpu"), (True, "meta")])
def test_a_checkpoint_in_few_bits_is_widened(assign, device):
    state = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in with_statistics(make()).state_dict().items()
    }
    layer = nn.Sequential(make(seed=1, device=device, dtype=torch.bfloat16))
    layer.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, assign=assign)
    norm = layer[0].router.norm
    for name in ("running_mean", "running_var"):
        assert getattr(norm, name).dtype == torch.float32
        assert torch.equal(getattr(norm, name), state[f"router.norm.{name}"].float())
        assert state[f"router.norm.{name}"].dtype == torch.bfloat16, "the checkpoint itself stays"
    x = torch.randn(6, 12).bfloat16()
    raw = layer[0].router.query(x).float()
    layer(x)
    mean = 0.9 * state["router.norm.running_mean"].float() + 0.1 * raw.mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_running_statistics_those_of_the_batch_are_used(use_reentrant, masked, dtype):
    x, mask = padded(dtype=dtype)
    arguments = (mask,) if masked else ()
    plain = make(dtype=dtype)
    bare = copy.deepcopy(plain)
    torch.func.replace_all_batch_norm_modules_(bare)
    y = plain(x, *arguments)
    y.square().sum().backward()
    leaf = x.clone().requires_grad_()
    y_bare = checkpoint(bare, leaf, *arguments, use_reentrant=use_reentrant)
    torch.testing.assert_close(y_bare, y, **TOLERANCES[dtype])
    y_bare.square().sum().backward()
    torch.testing.assert_close(gradients(bare), gradients(plain), **TOLERANCES[dtype])
    assert not list(bare.buffers())
    torch.testing.assert_close(bare.eval()(x, *arguments), y, **TOLERANCES[dtype])
    torch.testing.assert_close(bare.requires_grad_(False).train()(x, *arguments), y, **TOLERANCES[dtype])
    assert CASTS["bfloat16"](bare).router.norm.running_mean is None


def test_statistics_that_are_not_tracked_any_more_stay():
    layer = with_statistics(make())
    layer.router.norm.track_running_stats = False
    x, mask = padded()
    before = statistics(layer)
    for arguments in ((), (mask,)):
        y = layer(x, *arguments)
        torch.testing.assert_close(y, make()(x, *arguments))
        y_again = checkpoint(layer, x.clone().requires_grad_(), *arguments, use_reentrant=False)
        torch.testing.assert_close(y_again, y)
        y_again.sum().backward()
    assert_statistics_equal(layer, before, rtol=0, atol=0)


def test_sharing_statistics_without_any_or_without_a_group_raises():
    with pytest.raises(ValueError, match="init_process_group first"):
        share_query_statistics(make())
    with pytest.raises(ValueError, match="a member, got -100"):
        share_query_statistics(make(), torch.distributed.GroupMember.NON_GROUP_MEMBER)


def test_copies_and_pickles_without_a_group_are_equal():
    layer = nn.Sequential(with_statistics(make()), DenseFFN(12))
    layer.register_module("tied", layer[0].router.norm)
    layer.tied.referred = [layer.tied]  # as a hook may hold the module that it is of
    layer[0](padded()[0])
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.tied is other[0].router.norm
        assert other[0].router.norm is not layer[0].router.norm
        assert other.tied.referred[0] is other.tied
        for ours, theirs in zip(other.state_dict().values(), layer.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() != theirs.data_ptr()
