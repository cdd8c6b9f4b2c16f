"""Layers under torch.compile as a user calls it: right numbers, no warning, no failure of a compiler on the quiet."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from tinyexperts import PEER, ProductKeyMemory


def make(kind, *, sparse, frozen):
    torch.manual_seed(0)
    options = {"experts_per_head": 4}
    layer = kind(32, 64, num_heads=2, query_dim=8, sparse=sparse, **options)
    layer.experts.requires_grad_(not frozen)
    return layer


def assert_trains_alike(layer, compiled, num_tokens):
    results = []
    for module, inner in ((layer, layer), (compiled, compiled._orig_mod)):
        module.zero_grad()
        x = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(num_tokens)).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        got = results[1][name]
        assert got.layout == expected.layout
        torch.testing.assert_close(got.to_dense(), expected.to_dense(), msg=name)


# What is unfrozen and sparse breaks the graph: its gradient has no shape before it is computed.
@pytest.mark.parametrize(
    ("kind", "sparse", "frozen", "whole", "dynamic"),
    [
        (PEER, False, False, True, None),
        (PEER, False, False, True, True),
        (PEER, True, True, True, None),
        (PEER, True, False, False, None),
        (PEER, True, False, False, True),
        (ProductKeyMemory, False, False, True, None),
    ],
)
def test_nothing_fails_behind_the_scenes(kind, sparse, frozen, whole, dynamic, recwarn, caplog, capfd):
    torch._dynamo.reset()
    counters.clear()
    layer = make(kind, sparse=sparse, frozen=frozen)
    compiled = torch.compile(copy.deepcopy(layer), dynamic=dynamic, backend="aot_eager")
    for num_tokens in (7, 12):
        assert_trains_alike(layer, compiled, num_tokens)
    assert not counters["unimplemented"]
    assert counters["frames"]["total"] == counters["frames"]["ok"] >= 1
    assert not counters["aot_autograd"]["not_ok"]
    assert bool(counters["graph_break"]) != whole
    printed = capfd.readouterr()
    assert (printed.out, printed.err, caplog.records) == ("", "", [])
    assert [str(each.message) for each in recwarn] == []


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_the_default_compiler_gives_equal_values(sparse, recwarn, caplog):
    torch._dynamo.reset()
    counters.clear()
    layer = make(PEER, sparse=sparse, frozen=False)
    compiled = torch.compile(copy.deepcopy(layer))
    for num_tokens in (7, 9, 12):
        assert_trains_alike(layer, compiled, num_tokens)
    assert not counters["aot_autograd"]["not_ok"]
    assert caplog.records == []
    assert not any("Error detected" in str(each.message) for each in recwarn)
