"""PEER and ProductKeyMemory: against the paper's formula over all experts, costs, batch norm, compile."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.layers.product_key_router import ProductKeyRouter
from tinyexperts.ops.expert_mlp import reference as expert_mlp_reference
from tinyexperts.ops.product_key_topk import reference as topk_reference


def make(kind="peer", seed=0, **options):
    torch.manual_seed(seed)
    if kind == "peer":
        return PEER(12, 49, **({"num_heads": 3, "experts_per_head": 4, "query_dim": 6} | options))
    return ProductKeyMemory(12, 49, **({"num_heads": 3, "experts_per_head": 5, "query_dim": 6} | options))


def written_out_queries(router, x, query_norm):
    """Each head's queries of each token by itself, normalized by the formulas."""
    norm, num_heads = router.norm, router.num_heads
    weights_HQD = router.query.weight.unflatten(0, (num_heads, -1))
    query_MHQ = torch.stack([torch.stack([x_D @ w_QD.T for w_QD in weights_HQD]) for x_D in x.reshape(-1, x.shape[-1])])
    if query_norm == "none":
        return query_MHQ
    if query_norm == "batch":
        mean, var = norm.running_mean, norm.running_var
        if norm.training:
            mean, var = query_MHQ.flatten(1).mean(0), query_MHQ.flatten(1).var(0, unbiased=False)
        normed = (query_MHQ.flatten(1) - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
        return normed.view_as(query_MHQ)
    parts = query_MHQ.chunk({"layer": 1, "layer_halves": 2}[query_norm], dim=-1)
    centered = [part - part.mean(-1, keepdim=True) for part in parts]
    scaled = [part / (part.square().mean(-1, keepdim=True) + norm.eps).sqrt() for part in centered]
    return torch.cat([part * norm.weight + norm.bias for part in scaled], dim=-1)


def by_brute_force(
    layer,
    x,
    query_norm="batch",
    router_weights="softmax",
    shared_sub_keys=True,
    activation="gelu",
    gated=False,
    **_sizes,
):
    """The layer's output from all N scores and all N experts, by the paper's formulas for the options asked for."""
    router = layer.router
    query_MHQ = written_out_queries(router, x, query_norm)
    keys = router.sub_keys.expand(query_MHQ.shape[1], -1, -1, -1) if shared_sub_keys else router.sub_keys
    num_sub_keys = keys.shape[2]
    first, second = torch.arange(num_sub_keys**2) // num_sub_keys, torch.arange(num_sub_keys**2) % num_sub_keys
    product_keys_HNQ = torch.cat([keys[:, 0, first], keys[:, 1, second]], dim=-1)
    scores_MHN = torch.einsum("mhq,hnq->mhn", query_MHQ, product_keys_HNQ)
    top = scores_MHN.topk(router.experts_per_head)
    weights = {"softmax": top.values.softmax(-1), "sigmoid": top.values.sigmoid(), "relu": top.values.relu()}
    gates_MHN = torch.zeros_like(scores_MHN).scatter(-1, top.indices, weights[router_weights])
    x_MD = x.reshape(-1, x.shape[-1])
    if isinstance(layer, ProductKeyMemory):
        coefficients_MN = torch.ones(len(x_MD), len(layer.experts))
    else:
        act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "relu2": lambda h: F.relu(h) ** 2}[activation]
        coefficients_MN = act(x_MD @ layer.experts[:, 0].T)
        if gated:
            coefficients_MN = coefficients_MN * (x_MD @ layer.experts[:, 1].T)
    return ((gates_MHN.sum(1) * coefficients_MN) @ layer.experts[:, -1]).view(x.shape)


OPTIONS = [
    {},
    {"query_norm": "layer"},
    {"query_norm": "layer_halves"},
    {"query_norm": "none", "shared_sub_keys": False},
    {"router_weights": "sigmoid", "activation": "relu"},
    {"router_weights": "relu", "activation": "silu", "gated": True},
    {"gated": True, "activation": "relu2", "sparse": True},
]
MEMORY_OPTIONS = [
    {},
    {"query_norm": "none"},
    {"query_norm": "layer_halves", "shared_sub_keys": False},
    {"router_weights": "sigmoid"},
    {"router_weights": "relu", "shared_sub_keys": False, "sparse": True},
]


def with_any_norm(layer, seed=2):
    """A layer whose query norm has other numbers than at the start, which hide what is multiplied by them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in layer.router.norm.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2, generator=generator)
                if name in ("bias", "running_mean"):
                    tensor.sub_(1)
    return layer


KINDS_AND_OPTIONS = [*(("peer", each) for each in OPTIONS), *(("pkm", each) for each in MEMORY_OPTIONS)]


@pytest.mark.parametrize(("kind", "options"), KINDS_AND_OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_output_and_every_gradient_equal_brute_force(kind, options, training):
    layer = with_any_norm(make(kind, **options)).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    results = []
    for module, forward in ((layer, layer), (twin, lambda x: by_brute_force(twin, x, **options))):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        grads = {n: p.grad.to_dense() if p.grad.is_sparse else p.grad for n, p in module.named_parameters()}
        results.append((y, leaf.grad, grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=5e-5)
    touched = layer.route(x).ids.unique() if not training else None
    if touched is not None and layer.router.router_weights != "relu" and options.get("activation", "gelu") == "gelu":
        assert (results[0][2]["experts"][touched].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize(("kind", "options"), KINDS_AND_OPTIONS)
def test_in_evaluation_a_token_s_output_depends_on_no_other_token(kind, options):
    """As a causal model needs it: what follows a token changes nothing, and the token alone gives the same."""
    layer = with_any_norm(make(kind, **options)).eval()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    whole = layer(x)
    for length in range(5):
        torch.testing.assert_close(layer(x[:, :length]), whole[:, :length])
    for sequence, place in ((0, 0), (1, 3)):
        torch.testing.assert_close(layer(x[sequence, place]), whole[sequence, place])
        (gradient,) = torch.autograd.grad(whole[sequence, place].square().sum(), x, retain_graph=True)
        assert (gradient.flatten(0, 1).count_nonzero(-1).nonzero() == 5 * sequence + place).all()


def mixed_halves(query_MHQ):
    """Queries by the reshape of transformers' DogeCDMoE, whose halves are of two tokens: (half, token) for the rows."""
    halves = query_MHQ.reshape(2, *query_MHQ.shape[:2], query_MHQ.shape[-1] // 2)
    return torch.cat(list(halves), dim=-1)


@pytest.mark.parametrize(
    "promise",
    [
        test_in_evaluation_a_token_s_output_depends_on_no_other_token,
        functools.partial(test_output_and_every_gradient_equal_brute_force, training=False),
        functools.partial(test_output_and_every_gradient_equal_brute_force, training=True),
    ],
)
@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_the_published_fault_that_mixes_tokens_is_caught(promise, kind, monkeypatch):
    right, options = ProductKeyRouter.queries, {"num_heads": 1, "query_norm": "none"}
    promise(kind, options)
    layer, x = make(kind, **options), torch.randn(1, 12)
    expected = layer(x)
    monkeypatch.setattr(ProductKeyRouter, "queries", lambda router, *arguments: mixed_halves(right(router, *arguments)))
    assert torch.equal(layer(x), expected)  # token by token, as in generation, nothing is wrong
    with pytest.raises(AssertionError):
        promise(kind, options)


def test_every_expert_can_be_reached_and_receives_gradient():
    layer = PEER(16, 64, num_heads=1, experts_per_head=1, query_dim=16, query_norm="none")
    with torch.no_grad():
        layer.router.query.weight.copy_(torch.eye(16))
        layer.router.sub_keys.copy_(torch.eye(8).expand(2, -1, -1))
    i, j = torch.arange(64) // 8, torch.arange(64) % 8
    x = torch.cat([F.one_hot(i, 8), F.one_hot(j, 8)], -1).float()
    assert torch.equal(layer.route(x).ids.flatten(), torch.arange(64))
    layer(x).square().sum().backward()
    assert (layer.experts.grad.abs().amax((1, 2)) > 0).all()


def test_route_gives_documented_shapes_best_first():
    layer = make().eval()
    routing = layer.route(torch.randn(2, 5, 12))
    assert routing.ids.shape == routing.scores.shape == routing.weights.shape == (2, 5, 3, 4)
    assert routing.ids.dtype == torch.int64
    assert (routing.scores.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2, 5, 3))
    assert layer.router.query.weight.shape == (18, 12)
    assert layer.router.query.bias is None
    assert layer.router.sub_keys.shape == (2, 7, 3)
    assert make(shared_sub_keys=False).router.sub_keys.shape == (3, 2, 7, 3)
    assert layer.experts.shape == (49, 2, 12)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("peer", {}),
        ("peer", {"gated": True, "shared_sub_keys": False}),
        ("pkm", {}),
        ("pkm", {"shared_sub_keys": False, "query_norm": "layer_halves"}),
    ],
)
def test_flops_are_the_matmuls_that_the_reference_performs(kind, options):
    layer = make(kind, **options).eval()
    x, num_tokens = torch.randn(11, 12), 11
    router = layer.router
    with FlopCounterMode(display=False) as counter:
        scores, ids = topk_reference.product_key_topk(router.queries(x), router.sub_keys, router.experts_per_head)
    assert counter.get_total_flops() == layer.flops_per_token().router * num_tokens
    with FlopCounterMode(display=False) as counter:
        expert_mlp_reference.expert_mlp(
            x, layer.experts, ids.flatten(1), scores.softmax(-1).flatten(1), layer.activation
        )
    assert counter.get_total_flops() == layer.flops_per_token().experts * num_tokens
    assert layer.flops_per_token().total == layer.flops_per_token().router + layer.flops_per_token().experts


def test_parameters_are_counted():
    layer = make()
    assert layer.num_parameters().total == sum(p.numel() for p in layer.parameters())
    # H*P rows of 2*D, the query network, both halves of the sub-keys, and the norm's gain and bias
    assert layer.num_parameters().active == 12 * 2 * 12 + 18 * 12 + 2 * 7 * 3 + 2 * 18
    assert layer.parameter_groups().tables == [layer.experts]
    names = {id(p) for p in layer.parameter_groups().dense} | {id(layer.experts)}
    assert names == {id(p) for p in layer.parameters()}


@pytest.mark.parametrize(("query_norm", "num_added"), [("batch", 2 * 18), ("layer", 2 * 6), ("layer_halves", 2 * 3)])
@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_the_parameters_of_query_norms_are_counted(kind, query_norm, num_added):
    normed, bare = (make(kind, query_norm=each).num_parameters() for each in (query_norm, "none"))
    assert normed.active - bare.active == normed.total - bare.total == num_added


def test_query_batch_norm_uses_batch_statistics_in_training_and_running_ones_in_evaluation():
    layer = make()
    x = torch.randn(64, 12) * 3 + 1
    queries = layer.router.queries(x).flatten(1)
    torch.testing.assert_close(queries.mean(0), torch.zeros(18), atol=1e-5, rtol=0)
    torch.testing.assert_close(queries.var(0, unbiased=False), torch.ones(18), atol=1e-3, rtol=0)
    raw = layer.router.query(x)
    torch.testing.assert_close(layer.router.norm.running_mean, 0.1 * raw.mean(0))
    layer.eval()
    norm = layer.router.norm
    expected = (raw - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(layer.router.queries(x).flatten(1), expected)
    assert torch.equal(layer(x[:1]), layer(x)[:1]) or torch.allclose(layer(x[:1]), layer(x)[:1], atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_running_statistics_move_once_under_activation_checkpointing(use_reentrant):
    plain, checkpointed = make(), make()
    for step in range(3):  # three micro-batches, gradients accumulated
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        plain(x).sum().backward()
        leaf = x.clone().requires_grad_()
        checkpoint(checkpointed, leaf, use_reentrant=use_reentrant).sum().backward()
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(checkpointed.named_buffers())[name]), name
    assert plain.router.norm.num_batches_tracked == 3
    for (name, got), (_, expected) in zip(checkpointed.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


@pytest.mark.parametrize("kind", ["peer", "pkm"])
@pytest.mark.parametrize("sparse", [False, True])
def test_compiles_whole_with_equal_values(kind, sparse):
    layer = make(kind, sparse=sparse)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for num_tokens in (6, 9):  # the second size makes the shapes dynamic
        x = torch.randn(num_tokens, 12)
        for module in (layer, compiled):
            module.zero_grad()
        y, y_compiled = layer(x), compiled(x)
        torch.testing.assert_close(y_compiled, y)
        y.square().sum().backward()
        y_compiled.square().sum().backward()
        for (name, got), (_, expected) in zip(twin.named_parameters(), layer.named_parameters(), strict=True):
            assert got.grad.is_sparse == expected.grad.is_sparse == (sparse and name == "experts")
            dense = [g.to_dense() if g.is_sparse else g for g in (got.grad, expected.grad)]
            torch.testing.assert_close(dense[0], dense[1], msg=name)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(buffer, dict(layer.named_buffers())[name])


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_exports(kind):
    layer = make(kind).eval()
    program = torch.export.export(
        layer, (torch.randn(6, 12),), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}}
    )
    x = torch.randn(11, 12)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_autocast_reads_the_table_as_it_is():
    layer = make(query_norm="layer")
    x = torch.randn(9, 12)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(F.linear(x, torch.eye(12)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.experts.grad.dtype == torch.float32
    # A query in bf16 may retrieve another expert here and there.
    assert F.cosine_similarity(y.float().flatten(), expected.flatten(), dim=0) > 0.97


def test_empty_batch():
    for layer in (make(), make("pkm")):
        x = torch.zeros(0, 12, requires_grad=True)
        y = layer(x)
        assert y.shape == (0, 12)
        y.sum().backward()
        assert not layer.experts.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 50}, "got 50; the nearest squares are 49 and 64"),
        ({"num_experts": 49.0}, r"number of experts must be a whole number, got 49\.0"),
        ({"num_heads": "2"}, "num_heads must be a whole number, got '2'"),
        ({"query_dim": 8.0}, r"query_dim must be a whole number, got 8\.0"),
        ({"experts_per_head": 4.0}, r"experts retrieved a head must be a whole number, got 4\.0"),
        ({"num_experts": 0}, "got 0; the nearest squares are 1"),
        ({"query_dim": 7}, "query_dim must be even .*, got 7"),
        ({"experts_per_head": 8}, "between 1 and .* = 7, got 8"),
        ({"num_heads": 0}, "got 12 and 0"),
        ({"query_norm": "rms"}, "one of batch, layer, layer_halves, none, got 'rms'"),
        ({"router_weights": "tanh"}, "one of softmax, sigmoid, relu, got 'tanh'"),
        ({"activation": "tanh"}, "one of gelu, relu, relu2, silu, got 'tanh'"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        PEER(12, **({"num_experts": 49, "num_heads": 3, "experts_per_head": 4, "query_dim": 6} | options))


def test_the_output_is_of_the_size_of_the_input_at_the_start():
    torch.manual_seed(0)
    layer = PEER(64, 64**2)
    x = torch.randn(256, 64)
    assert 0.01 < layer(x).square().mean().sqrt() < 1


def test_an_empty_batch_in_training_leaves_the_running_statistics_alone():
    layer = make()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer(torch.zeros(0, 12))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_initial_weights_are_as_documented_and_follow_the_generator():
    layer = PEER(64, 32**2, gated=True)
    assert layer.experts[:, :2].std().item() == pytest.approx(1 / 8, rel=0.02)
    assert layer.experts[:, 2].std().item() == pytest.approx(1 / 16, rel=0.02)
    assert layer.router.query.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    torch.testing.assert_close(layer.router.sub_keys.norm(dim=-1), torch.ones(2, 32))
    memory = ProductKeyMemory(64, 32**2)
    assert memory.experts.std().item() == pytest.approx(1 / 8, rel=0.02)
    for module in (layer, memory):
        states = []
        for seed in (0, 0, 1):
            module.reset_parameters(torch.Generator().manual_seed(seed))
            states.append({name: tensor.clone() for name, tensor in module.named_parameters() if "norm" not in name})
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("query_norm", ["batch", "layer", "layer_halves"])
def test_a_norm_that_was_replaced_is_applied(query_norm):
    layer, x = make(query_norm=query_norm), torch.randn(5, 12)
    expected = layer(x)
    layer.router.norm = torch.nn.Sequential(layer.router.norm)  # as torch.compile and SyncBatchNorm wrap or replace it
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer.router.queries(x).flatten(1), layer.router.query(x), atol=1e-2)


@pytest.mark.parametrize("make", [PEER, ProductKeyMemory])
def test_the_memory_of_parameters_stays_their_owners_to_shrink(make):
    """As FSDP2 does with what it has gathered; a view of a parameter by numpy() would forbid it for good."""
    layer = make(16, 32**2, num_heads=2, query_dim=4)
    layer(torch.randn(3, 16)).sum().backward()
    assert all(parameter.untyped_storage().resizable() for parameter in layer.parameters())
