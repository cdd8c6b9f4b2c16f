"""Layers with quantized tables: equal to layers of the same numbers, and whole through saving, copies and casts."""

from __future__ import annotations

import copy

import pytest
import torch
from operands import assert_equal, randn
from safetensors.torch import load_file, save_file
from torch import nn

from tinyexperts import PEER, DenseFFN, ProductKeyMemory
from tinyexperts.errors import InputError
from tinyexperts.layers import PEERConfig, ProductKeyMemoryConfig, quantize_tables_
from tinyexperts.ops import quantize_groups, quantize_vectors
from tinyexperts.ops.expert_mlp import reference
from tinyexperts.ops.rank_groups import RankGroups
from tinyexperts.optim import build_optimizers, split_parameters

SIZES = {"num_heads": 3, "experts_per_head": 4, "query_dim": 6}
KINDS = {"peer": (PEER, {}), "gated": (PEER, {"gated": True}), "memory": (ProductKeyMemory, {})}
D = 45  # a group of 32, and 13

each_kind = pytest.mark.parametrize("kind", list(KINDS))
each_bits = pytest.mark.parametrize("bits", [8, 4])


def make(kind="peer", bits=None, **options):
    torch.manual_seed(0)
    make_layer, own = KINDS[kind]
    layer = make_layer(D, 49, **SIZES, **own, **options).eval()
    with torch.no_grad():
        layer.experts.mul_(torch.linspace(0.1, 3, 49)[:, None, None])  # as uneven as a trained one
    if bits is not None:
        layer.quantize_(bits)
    return layer


def of_the_numbers(layer, kind):
    """A layer with a table of numbers that are those of a quantized one, by the reference."""
    twin = make(kind)
    twin.load_state_dict({n: t for n, t in layer.state_dict().items() if n not in ("experts", "scales")}, strict=False)
    with torch.no_grad():
        twin.experts.copy_(reference.numbers_of(layer.experts, layer.scales, D, torch.float32))
    return twin


def results(layer, x):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(randn(*x.shape, seed=3))
    return {"y": y.detach(), "x": leaf.grad} | {n: p.grad for n, p in layer.named_parameters() if n != "experts"}


@pytest.mark.usefixtures("kernels")
@each_kind
@each_bits
@pytest.mark.parametrize("training", [False, True])
def test_it_equals_a_layer_of_its_numbers_in_outputs_and_gradients(kind, bits, training):
    layer = make(kind, bits).train(training)
    twin = of_the_numbers(layer, kind).train(training)
    x = randn(2, 5, D, seed=1)
    got, expected = results(layer, x), results(twin, x)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert got["router.query.weight"].any()


@each_kind
@each_bits
def test_the_table_is_what_the_operators_make_of_it(kind, bits):
    layer = make(kind)
    table, scales = (quantize_vectors if bits == 8 else quantize_groups)(layer.experts)
    layer.quantize_(bits)
    assert_equal([layer.experts, layer.scales], [table, scales])
    assert layer.table_bits == bits
    assert "experts" not in dict(layer.named_parameters())
    assert not layer.experts.requires_grad


@each_kind
@each_bits
def test_an_empty_layer_loads_what_was_saved(kind, bits, tmp_path):
    layer = make(kind, bits)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    make_layer, own = KINDS[kind]
    empty = make_layer(D, 49, **SIZES, **own, table_bits=bits).eval()
    x = randn(7, D, seed=1)
    assert not empty(x).any()
    missing, unexpected = empty.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert missing == unexpected == []
    assert torch.equal(empty(x), layer(x))
    assigned = make_layer(D, 49, **SIZES, **own, table_bits=bits, device="meta").eval()
    assigned.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert torch.equal(assigned(x), layer(x))


@each_bits
def test_no_table_of_numbers_is_made_for_an_empty_layer(bits, monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: made.append(empty(*a, **o)) or made[-1])
    layer = PEER(256, 64**2, **SIZES, table_bits=bits)
    assert max(t.numel() * t.element_size() for t in made) == layer.experts.numel() * layer.experts.element_size()


@each_bits
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_casts_leave_integers_and_scales_as_they_are(bits, cast):
    layer = make("gated", bits)
    before = layer.experts.clone(), layer.scales.clone()
    model = cast(nn.Sequential(layer))
    assert_equal([layer.experts, layer.scales], list(before))
    x = randn(7, D, seed=1).to(layer.router.query.weight.dtype)
    assert model(x).dtype == x.dtype
    assert_equal([model.float()[0].experts, layer.scales], list(before))


@each_bits
def test_it_moves_to_a_device_and_is_copied(bits):
    layer = make("peer", bits)
    twin = copy.deepcopy(layer)
    x = randn(7, D, seed=1)
    assert torch.equal(twin(x), layer(x))
    twin.scales.zero_()
    assert layer.scales.any()
    moved = copy.deepcopy(layer).to("meta", torch.bfloat16)
    assert moved.experts.is_meta
    assert moved.scales.is_meta
    assert moved.scales.dtype == layer.scales.dtype
    assert moved.router.query.weight.dtype == torch.bfloat16


@each_kind
@each_bits
def test_counts_are_those_of_the_table_of_numbers(kind, bits):
    layer, numbers = make(kind, bits), make(kind)
    assert layer.num_parameters() == numbers.num_parameters()
    assert layer.flops_per_token() == numbers.flops_per_token()
    assert (layer.model_dim, layer.retrieved_per_token) == (D, 12)
    num_vectors = numbers.experts.shape[1]
    assert numbers.row_bytes == num_vectors * D * 4
    assert layer.row_bytes == num_vectors * ((D + 4) if bits == 8 else (23 + 2 * 2))
    groups = layer.parameter_groups()
    assert groups.tables == []
    assert {id(p) for p in groups.dense} == {id(p) for p in layer.parameters()}


@each_kind
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_vectors_are_read_as_numbers(kind, bits):
    layer = make(kind, bits)
    whole = layer.experts.detach()
    if bits is not None:
        whole = reference.numbers_of(layer.experts, layer.scales, D, torch.float32)
    ids = torch.tensor([[3, 48, 3], [0, 1, 7]])
    assert torch.equal(layer.vectors_of(ids).detach(), whole[ids])
    assert torch.equal(layer.vectors_of(ids, slice(-1, None)).detach(), whole[ids][..., -1:, :])
    assert torch.equal(layer.vectors_of(torch.tensor(5)).detach(), whole[5])
    assert layer.vectors_of(ids[:0], slice(0, -1)).shape == (0, 3, whole.shape[1] - 1, D)
    assert layer.vectors_of(ids).requires_grad == (bits is None)


@each_bits
def test_it_compiles_whole_and_exports(bits):
    layer = make("peer", bits)
    x = randn(9, D, seed=1)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (randn(6, D),), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}})
    torch.testing.assert_close(program.module()(x), layer(x))


@each_bits
def test_all_tables_of_a_model_are_quantized_in_place(bits):
    model = nn.Sequential(nn.Linear(D, D), nn.ModuleDict({"peer": make("peer"), "memory": make("memory")}))
    x = randn(20, D, seed=1)
    before = {name: layer(x) for name, layer in model[1].items()}
    quantize_tables_(model, bits)
    for name, layer in model[1].items():
        assert layer.table_bits == bits
        difference = (layer(x) - before[name]).norm() / before[name].norm()
        assert 0 < difference < (0.01 if bits == 8 else 0.12)


def test_what_can_not_be_quantized_is_refused_and_left_as_it_is():
    model = nn.Sequential(make("peer"), make("memory"))
    for bits in (16, 0, "8", None):
        with pytest.raises(InputError, match=f"table_bits must be 8 or 4, got {bits!r}"):
            quantize_tables_(model, bits)
    with pytest.raises(InputError, match="table_bits must be 8 or 4, got 5"):
        PEER(D, 49, **SIZES, table_bits=5)
    with torch.no_grad():
        model[1].experts[7, 0, 2] = -torch.inf
    with pytest.raises(InputError, match="a table that is quantized must be finite, got -inf"):
        quantize_tables_(model, 8)
    assert [layer.table_bits for layer in model] == [None, None]
    with torch.no_grad():
        model[1].experts[7, 0, 2] = 0
    model[1].quantize_(4)
    with pytest.raises(InputError, match="a table is quantized once, got one that has 4 bits"):
        quantize_tables_(model, 8)
    assert [layer.table_bits for layer in model] == [None, 4]
    with pytest.raises(InputError, match="Linear has none"):
        quantize_tables_(nn.Linear(3, 3), 8)
    with pytest.raises(InputError, match="DenseFFN has none"):
        quantize_tables_(DenseFFN(8), 8)


def test_ranks_share_no_quantized_table(monkeypatch):
    ranks = RankGroups.__new__(RankGroups)
    monkeypatch.setattr(RankGroups, "num_shards", 2, raising=False)
    message = "a quantized table is not shared by ranks, got 2 that share the columns"
    with pytest.raises(InputError, match=message):
        ProductKeyMemory(128, 49, **SIZES, table_bits=8, ranks=ranks)
    layer = make()
    layer.ranks = ranks
    with pytest.raises(InputError, match=message):
        layer.quantize_(8)
    assert layer.table_bits is None


def test_integers_are_not_loaded_as_numbers_nor_numbers_as_integers():
    numbers, int8, int4 = (make("peer", bits) for bits in (None, 8, 4))
    for layer, other in ((numbers, int8), (int8, numbers), (int8, int4), (int4, numbers)):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="make the layer with the table_bits of what it loads"):
                layer.load_state_dict(other.state_dict(), strict=strict)
        assert torch.equal(layer.experts, before["experts"])
    numbers.load_state_dict(make().bfloat16().state_dict())  # of other floats, as ever


@each_bits
def test_no_optimizer_is_built_for_a_quantized_table(bits):
    model = nn.ModuleDict({"embedding": nn.Embedding(9, D), "layer": make("peer", bits), "head": nn.Linear(D, 9)})
    rates = {"matrix_lr": 1e-3, "embedding_lr": 1e-3, "head_lr": 1e-3, "vector_lr": 1e-3}
    for sparse_tables in (True, False):
        with pytest.raises(InputError, match=f"a quantized table is not trained, got one of {bits} bits in layer: "):
            build_optimizers(model, sparse_tables=sparse_tables, **rates)
    assert split_parameters(model).tables == {}
    # What is around it can be trained by an optimizer of one's own.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    table, query = model["layer"].experts.clone(), model["layer"].router.query.weight.detach().clone()
    model["head"](model["layer"](model["embedding"](torch.arange(9)))).square().sum().backward()
    optimizer.step()
    assert torch.equal(model["layer"].experts, table)
    assert not torch.equal(model["layer"].router.query.weight, query)


@each_bits
def test_drawing_again_makes_the_table_zero_and_the_router_new(bits):
    layer = make("peer", bits)
    keys = layer.router.sub_keys.detach().clone()
    layer.reset_parameters(torch.Generator().manual_seed(5))
    assert not layer(randn(4, D)).any()
    assert not torch.equal(layer.router.sub_keys, keys)


@pytest.mark.parametrize("config", [PEERConfig, ProductKeyMemoryConfig])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_config_builds_it(config, bits):
    layer = config(num_experts=49, **SIZES, table_bits=bits).build(D, device="meta")
    assert layer.table_bits == bits
    assert isinstance(layer.experts, nn.Parameter) == (bits is None)
