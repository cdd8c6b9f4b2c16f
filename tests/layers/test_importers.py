"""Layers of PEER-pytorch and product-key-memory, imported: equal by value, trained alike; what can't be, refused."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys

import PEER_pytorch
import pytest
import torch
from product_key_memory import PKM
from torch import nn

from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.errors import InputError
from tinyexperts.layers import DenseFFN, SumOfLayers, from_peer_pytorch, from_product_key_memory
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.optim import build_optimizers

D = 22
# A gradient of the table is a sum of products, and each side rounds it in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def with_any_weights(module, seed=1):
    """Their module with weights that give outputs of the size of inputs, and sub-keys that are no near ties."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            std = 0.2 if "embed" in name or "values" in name else 1.0 if name == "keys" else 0.3
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std
            parameter.copy_(drawn + (1 if "norm" in name and name.endswith("weight") else 0))
    return module


def peer(dim=D, seed=1, **options):
    torch.manual_seed(0)
    sizes = {"heads": 3, "num_experts": 81, "num_experts_per_head": 4, "dim_key": 5, "non_competing_scores": False}
    return with_any_weights(PEER_pytorch.PEER(dim, **(sizes | options)), seed)


def memory(dim=D, seed=1, **options):
    torch.manual_seed(0)
    return with_any_weights(PKM(dim, **({"heads": 3, "num_keys": 11, "topk": 5, "dim_head": 5} | options)), seed)


def tokens(*shape, seed=3, **options):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), **options)


PEER_OPTIONS = [
    {"non_competing_scores": competing, "pre_rmsnorm": norm, "separate_embed_per_head": separate, "activation": act}
    for competing, norm, separate, act in itertools.product(
        (False, True), (False, True), (False, True), (nn.GELU, nn.ReLU, nn.SiLU)
    )
]
MEMORY_OPTIONS = [
    {"non_competitive_gates": gates, "pre_layernorm": before, "norm_output": after}
    for gates, before, after in itertools.product((False, True), repeat=3)
]
MAPPED = [
    *((peer, from_peer_pytorch, options) for options in PEER_OPTIONS),
    (peer, from_peer_pytorch, {"product_key_topk": 7}),
    (peer, from_peer_pytorch, {"heads": 1, "num_experts_per_head": 9, "dim_key": None}),
    (peer, from_peer_pytorch, {"heads": 1, "separate_embed_per_head": True, "product_key_topk": 1, "num_experts": 1,
                               "num_experts_per_head": 1}),
    *((memory, from_product_key_memory, options) for options in MEMORY_OPTIONS),
    (memory, from_product_key_memory, {"heads": 1, "topk": 11, "dim_head": 2}),
]  # fmt: skip


def in_their_order(ours, values):
    """Values of our parameters (a function of a parameter), by the names and in the shapes of theirs."""
    layers = [each for each in ours.modules() if isinstance(each, ProductKeyLayer)]
    queries = [values(e.router.query.weight).view(e.router.num_heads, 2, -1, D) for e in layers]
    tables = torch.cat([values(e.experts).to_dense() for e in layers]).unbind(1)
    found = {
        "keys": torch.cat([values(e.router.sub_keys) for e in layers]).transpose(1, 2),
        "queries": torch.cat(queries).transpose(0, 1).flatten(0, 2),
    }
    if isinstance(layers[0], PEER):
        found |= {"down": tables[0], "up": tables[1]}
        if isinstance(ours, nn.Sequential):
            found["gamma"] = values(ours[0].weight)
        return found
    found |= {"values": tables[0], "norm.weight": values(layers[0].router.norm.weight)}
    found["norm.bias"] = values(layers[0].router.norm.bias)
    if isinstance(ours, nn.Sequential):
        parts = list(ours)
        for name, norm in (("before", parts[0]), ("after", parts[-1])):
            if isinstance(norm, nn.LayerNorm):
                found |= {f"{name}.weight": values(norm.weight), f"{name}.bias": values(norm.bias)}
    return found


SHORT = {"to_queries.0.weight": "queries", "to_queries.weight": "queries", "weight_down_embed.weight": "down",
         "weight_up_embed.weight": "up", "norm.gamma": "gamma", "values.weight": "values",
         "pre_layernorm.weight": "before.weight", "pre_layernorm.bias": "before.bias",
         "output_norm.weight": "after.weight", "output_norm.bias": "after.bias"}  # fmt: skip


def of_theirs(theirs, values):
    return {SHORT.get(name, name): values(parameter).to_dense() for name, parameter in theirs.named_parameters()}


def gradient(parameter):
    return parameter.grad


@pytest.mark.parametrize(("make", "convert", "options"), MAPPED)
def test_output_and_every_gradient_are_theirs(make, convert, options):
    theirs = make(**options)
    ours = convert(theirs)
    x = tokens(2, 7)
    results = []
    for module, arranged in ((ours, in_their_order), (theirs, of_theirs)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * tokens(2, 7, seed=4)).sum().backward()
        results.append((y, leaf.grad, arranged(module, gradient)))
    assert results[1][0].abs().mean() > 0.03
    torch.testing.assert_close(results[0], results[1], **CLOSE)
    assert results[0][2].keys() == results[1][2].keys()
    for name, of_ours in in_their_order(ours, lambda parameter: parameter.detach()).items():
        of_their = of_theirs(theirs, lambda parameter: parameter.detach())[name]
        assert torch.equal(of_ours, of_their + 1 if name == "gamma" else of_their), name


@pytest.mark.parametrize(("make", "convert", "options"), MAPPED)
def test_steps_of_training_keep_them_equal(make, convert, options):
    theirs = make(**options)
    ours = convert(theirs)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9) for module in (ours, theirs)]
    before = of_theirs(theirs, lambda parameter: parameter.detach().clone())
    for step in range(3):
        x, goal = tokens(1, 9, seed=step), tokens(1, 9, seed=step + 10)
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (module(x) - goal).square().mean().backward()
            optimizer.step()
    got = in_their_order(ours, lambda parameter: parameter.detach())
    for name, expected in of_theirs(theirs, lambda parameter: parameter.detach()).items():
        torch.testing.assert_close(got[name], expected + 1 if name == "gamma" else expected, **CLOSE)
    changed = {name for name in before if not torch.equal(of_theirs(theirs, torch.Tensor.detach)[name], before[name])}
    assert {"keys", "queries"} & changed == ({"keys", "queries"} if learns_to_choose(options) else set())
    torch.testing.assert_close(ours(tokens(1, 4)), theirs(tokens(1, 4)), **CLOSE)


def learns_to_choose(options):
    """The softmax of a single score is 1 whatever it is."""
    return options.get("num_experts_per_head") != 1


@pytest.mark.parametrize(
    ("make", "convert", "options"),
    [
        (peer, from_peer_pytorch, {"pre_rmsnorm": True, "separate_embed_per_head": True}),
        (peer, from_peer_pytorch, {}),
        (memory, from_product_key_memory, {"pre_layernorm": True, "norm_output": True}),
        (memory, from_product_key_memory, {}),
    ],
)
def test_tokens_of_any_leading_dimensions(make, convert, options):
    theirs = make(**options)
    ours = convert(theirs)
    x = tokens(3, 5)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, **CLOSE)
    torch.testing.assert_close(ours(x[1]), expected[1], **CLOSE)
    torch.testing.assert_close(ours(x[1, 2]), expected[1, 2], **CLOSE)
    torch.testing.assert_close(ours(x[:, :, None]), expected[:, :, None], **CLOSE)
    torch.testing.assert_close(ours(x[:1, :1]), theirs(x[:1, :1]), **CLOSE)
    for shape in ((2, 0), (0, 3), (0,)):  # which theirs fail at
        assert ours(tokens(*shape)).shape == (*shape, D)
    leaf = tokens(0, requires_grad=True)
    ours(leaf).sum().backward()
    assert leaf.grad.shape == (0, D)
    assert not any(parameter.grad.any() for parameter in ours.parameters())


def test_what_their_defaults_ask_for_is_what_the_result_says():
    torch.manual_seed(0)
    theirs = PEER_pytorch.PEER(32, num_experts=20**2, num_experts_per_head=16)
    ours = from_peer_pytorch(theirs)
    router = ours.router
    assert (router.experts_per_head, router.router_weights, router.query_norm) == (1, "relu", "none")
    assert (router.num_heads, router.query_dim, ours.activation) == (8, 32, "gelu")
    x = torch.randn(2, 9, 32)
    y = ours(x)
    torch.testing.assert_close(y, theirs(x), **CLOSE)
    # A head whose best score is negative adds nothing.
    with torch.no_grad():
        theirs.keys.copy_(-theirs.keys.abs())
        theirs.to_queries[0].weight.copy_(theirs.to_queries[0].weight.abs())
    ours, x = from_peer_pytorch(theirs), x.abs()
    assert not ours(x).any()
    assert not theirs(x).any()
    ours(x).sum().backward()
    assert not any(parameter.grad.any() for parameter in ours.parameters())
    memory = from_product_key_memory(PKM(32))
    assert (memory.router.num_heads, memory.router.experts_per_head, memory.router.query_dim) == (4, 32, 256)
    assert (memory.router.router_weights, memory.router.query_norm) == ("softmax", "layer_halves")
    assert len(memory.experts) == 128**2
    with torch.no_grad():
        assert memory.router.norm.weight.numel() == 128


@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-9, 1.0])
def test_tokens_next_to_zero_are_normalized_as_theirs(size):
    """But for those of a norm near 1e-12: theirs divides by the larger of both, torch by the root of their squares."""
    theirs = peer(pre_rmsnorm=True)
    norm = from_peer_pytorch(theirs)[0]
    x = tokens(4) / D**0.5 * size
    results = []
    for module in (norm, theirs.norm):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * tokens(4, seed=4)).sum().backward()
        results.append((y, leaf.grad))
    for got, expected in zip(*results, strict=True):
        largest = expected.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(got / largest, expected / largest, rtol=0, atol=3e-4)
    assert results[0][1].any()


BOTH = [
    (peer, from_peer_pytorch, {}),
    (peer, from_peer_pytorch, {"pre_rmsnorm": True, "separate_embed_per_head": True}),
    (memory, from_product_key_memory, {"pre_layernorm": True, "norm_output": True}),
]


@pytest.mark.parametrize(("make", "convert", "options"), BOTH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device_are_kept(make, convert, options, dtype):
    theirs = make(**options).to(dtype)
    ours = convert(theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert ours(tokens(2, 3).to(dtype)).dtype == dtype
    if dtype == torch.float64:
        x = tokens(2, 7, dtype=dtype)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    on_meta = convert(make(**options).to("meta"))
    assert all(parameter.is_meta for parameter in on_meta.parameters())


@pytest.mark.parametrize(("make", "convert", "options"), BOTH)
def test_their_module_and_the_random_numbers_are_left_alone(make, convert, options):
    theirs = make(**options)
    theirs(tokens(1, 2)).sum().backward()
    before = {name: (p.clone(), p.grad.clone(), p.requires_grad) for name, p in theirs.named_parameters()}
    random_state = torch.get_rng_state()
    ours = convert(theirs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in ours.parameters())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    for name, parameter in theirs.named_parameters():
        for now, was in zip((parameter, parameter.grad, parameter.requires_grad), before[name], strict=True):
            assert torch.equal(torch.as_tensor(now), torch.as_tensor(was)), name


@pytest.mark.parametrize(("make", "convert", "options"), BOTH)
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept_and_what_is_frozen(make, convert, options, training):
    theirs = make(**options).train(training)
    assert all(module.training == training for module in convert(theirs).modules())
    assert all(parameter.requires_grad for parameter in convert(theirs).parameters())
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("key" in name or "embed" in name or "values" in name)
    ours = convert(theirs)
    trained = {name.rpartition(".")[2] for name, parameter in ours.named_parameters() if parameter.requires_grad}
    frozen = {name.rpartition(".")[2] for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert trained == {"sub_keys", "experts"}
    assert frozen <= {"weight", "bias"}
    theirs.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in convert(theirs).parameters())


def test_tables_with_sparse_gradients_stay_so():
    theirs = peer(separate_embed_per_head=True)
    theirs.weight_down_embed.sparse = theirs.weight_up_embed.sparse = True
    stored = memory()
    stored.values.sparse = True
    for module, convert in ((theirs, from_peer_pytorch), (stored, from_product_key_memory)):
        ours = convert(module)
        for each in (ours, module):
            each(tokens(1, 3)).square().sum().backward()
        tables = [parameter for name, parameter in ours.named_parameters() if name.endswith("experts")]
        assert all(table.grad.is_sparse for table in tables)
        expected = of_theirs(module, gradient)
        for name, got in in_their_order(ours, gradient).items():
            torch.testing.assert_close(got, expected[name], **CLOSE)


@pytest.mark.parametrize(("make", "convert", "options"), BOTH)
def test_the_result_is_saved_copied_and_optimized_as_any_layer(make, convert, options):
    ours, other = convert(make(**options)), convert(make(seed=2, **options))
    x = tokens(2, 3)
    assert not torch.allclose(ours(x), other(x))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(ours(x), other(x))
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    tables = {id(parameter) for name, parameter in ours.named_parameters() if name.endswith("experts")}
    rates = {"matrix_lr": 1e-3, "embedding_lr": None, "head_lr": None, "vector_lr": 1e-3}
    (optimizer,) = build_optimizers(ours, sparse_tables=False, **rates)
    grouped = {group["name"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert grouped["tables"] == tables
    assert set().union(*grouped.values()) == {id(parameter) for parameter in ours.parameters()}


@pytest.mark.parametrize(
    ("make", "convert", "options", "message"),
    [
        (peer, from_peer_pytorch, {"product_key_topk": 3}, "product_key_topk must be between .*, 4, .*, 9, got 3"),
        (peer, from_peer_pytorch, {"product_key_topk": 10}, "product_key_topk must be between .*, 4, .*, 9, got 10"),
        (peer, from_peer_pytorch, {"num_experts": 9}, "product_key_topk must be between .*, 4, .*, 3, got 4"),
        (peer, from_peer_pytorch, {"dropout": 0.1}, r"^dropout must be 0, got 0\.1: .*module\.dropout\.p = 0"),
        (peer, from_peer_pytorch, {"activation": nn.Tanh}, r"activation must be nn\.GELU .* got Tanh\(\)"),
        (peer, from_peer_pytorch, {"activation": lambda: nn.GELU("tanh")}, "activation .* got GELU.*tanh"),
        (peer, from_peer_pytorch, {"activation": lambda: torch.relu}, "activation must be .* got <built-in"),
        (memory, from_product_key_memory, {"use_layernorm": False}, "use_layernorm must be True, got False: .*batch"),
        (memory, from_product_key_memory, {"concat_values_and_combine": True}, "concat_values_and_combine must be Fal"),
        (memory, from_product_key_memory, {"differentiable_topk": True}, "differentiable_topk must be False, got True"),
        *(
            (
                memory,
                from_product_key_memory,
                {f"{name}_dropout": 0.5},
                rf"^{name}_dropout must be 0, got 0\.5: .*p = 0",
            )
            for name in ("input", "query", "value", "attn")
        ),
        (memory, from_product_key_memory, {"topk": 12}, "between 1 and .* = 11, got 12"),
    ],
)
def test_an_option_without_a_counterpart_is_refused_by_its_name(make, convert, options, message):
    with pytest.raises(InputError, match=message):
        convert(make(**options))


def test_dropout_that_was_turned_off_is_none():
    theirs = peer(dropout=0.5)
    theirs.dropout.p = 0
    torch.testing.assert_close(from_peer_pytorch(theirs)(tokens(1, 3)), theirs(tokens(1, 3)), **CLOSE)


class OwnPEER(PEER_pytorch.PEER):
    """May compute anything."""


@pytest.mark.parametrize(
    ("convert", "module", "got"),
    [
        (from_peer_pytorch, lambda: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (from_peer_pytorch, lambda: PEER_pytorch.PEERLora(8, num_experts=64), "PEERLora"),
        (from_peer_pytorch, lambda: PEER_pytorch.ChunkedPEER(peer()), "ChunkedPEER"),
        (from_peer_pytorch, lambda: PEER_pytorch.PKAttention(16, num_key_values=64), "PKAttention"),
        (from_peer_pytorch, lambda: OwnPEER(8, num_experts=64), "OwnPEER"),
        (from_peer_pytorch, lambda: PEER(8, 256), r"tinyexperts\.layers\.peer\.PEER"),
        (from_peer_pytorch, memory, r"product_key_memory\.PKM"),
        (from_peer_pytorch, lambda: peer().state_dict(), r"collections\.OrderedDict"),
        (from_peer_pytorch, lambda: None, r"builtins\.NoneType"),
        (from_product_key_memory, peer, r"PEER_pytorch\.PEER\.PEER"),
        (from_product_key_memory, lambda: PEER_pytorch.PEER, r"builtins\.type"),
    ],
)
def test_another_class_is_refused_by_its_name(convert, module, got):
    with pytest.raises(InputError, match=rf"^module must be a .*, got .*{got}$"):
        convert(module())


def test_a_module_that_was_changed_is_refused_where_that_is_seen():
    theirs = peer()
    theirs.weight_up_embed.sparse = True
    with pytest.raises(InputError, match=r"sparse must be the same for .* got False and True"):
        from_peer_pytorch(theirs)
    theirs = peer()
    theirs.weight_down_embed.requires_grad_(False)
    with pytest.raises(InputError, match=r"requires_grad must be the same for .* got False and True"):
        from_peer_pytorch(theirs)
    theirs = peer()
    theirs.weight_down_embed.bfloat16()
    with pytest.raises(InputError, match=r"one dtype and device, got torch\.bfloat16 on cpu, torch\.float32 on cpu"):
        from_peer_pytorch(theirs)
    theirs = peer()
    del theirs.product_key_topk, theirs.heads
    with pytest.raises(InputError, match=r"as PEER-pytorch 0\.2\.2 makes it, got one without heads, product_key_topk"):
        from_peer_pytorch(theirs)
    theirs = peer()
    theirs.score_activation = nn.Sigmoid()
    with pytest.raises(InputError, match=r"function of the scores must be .* got Sigmoid\(\)"):
        from_peer_pytorch(theirs)
    theirs = peer()
    theirs.norm = nn.LayerNorm(D)
    with pytest.raises(InputError, match=r"norm must be .* got torch\.nn\.modules\.normalization\.LayerNorm"):
        from_peer_pytorch(theirs)
    for name in ("norm", "pre_layernorm", "output_norm"):
        theirs = memory()
        setattr(theirs, name, nn.RMSNorm(D))
        with pytest.raises(InputError, match=rf"{name} must be .* got torch\.nn\.modules\.normalization\.RMSNorm"):
            from_product_key_memory(theirs)


def test_neither_package_is_imported():
    code = (
        "import sys, tinyexperts.layers; assert not {'PEER_pytorch', 'product_key_memory', 'einops'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_sum_counts_what_its_layers_cost_and_have():
    layers = [PEER(12, 49, num_heads=2, experts_per_head=3, query_dim=4), DenseFFN(12, 7), ProductKeyMemory(12, 32**2)]
    layer, x = SumOfLayers(layers), torch.randn(2, 3, 12)
    torch.testing.assert_close(layer.eval()(x), layers[0](x) + layers[1](x) + layers[2](x))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    masked = copy.deepcopy(layer).train()(x, mask)
    torch.testing.assert_close(masked, sum(copy.deepcopy(each).train()(x, mask) for each in layers))
    assert not torch.allclose(masked, copy.deepcopy(layer).train()(x))  # batch statistics of other tokens
    assert layer.flops_per_token().router == sum(each.flops_per_token().router for each in layers)
    assert layer.flops_per_token().experts == sum(each.flops_per_token().experts for each in layers)
    assert layer.num_parameters().total == sum(parameter.numel() for parameter in layer.parameters())
    assert layer.num_parameters().active == sum(each.num_parameters().active for each in layers)
    assert [id(table) for table in layer.parameter_groups().tables] == [id(layers[0].experts), id(layers[2].experts)]
    groups = layer.parameter_groups()
    assert {id(p) for p in (*groups.dense, *groups.tables)} == {id(parameter) for parameter in layer.parameters()}
    before = layer.flops_per_token(), layer.num_parameters()
    layer.layers[0] = torch.compile(layer.layers[0], backend="eager")
    assert (layer.flops_per_token(), layer.num_parameters()) == before
    with pytest.raises(InputError, match="layers must be feed-forward layers, at least one, got none"):
        SumOfLayers([])
    with pytest.raises(InputError, match="at least one, got Linear"):
        SumOfLayers([layers[0], nn.Linear(12, 12)])
