"""A layer on the CPU computes there, whatever torch.set_default_device says."""

from __future__ import annotations

import pytest
import torch

from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.evaluation import expert_usage
from tinyexperts.ops import expert_mlp, quantize_vectors
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients


def train(kind, *, sparse, fused, second_moment):
    options = {"experts_per_head": 3}
    torch.manual_seed(0)
    layer = kind(16, 49, num_heads=2, query_dim=4, sparse=sparse, device="cpu", **options)
    rest = [p for p in layer.parameters() if p is not layer.experts] + ([] if sparse else [layer.experts])
    optimizers = [torch.optim.AdamW(rest, lr=0.01)]
    if sparse:
        optimizers.append(RowSparseAdam([layer.experts], fused=fused, second_moment=second_moment))
    norms = []
    for step in range(3):
        x = torch.randn(40, 16, generator=torch.Generator("cpu").manual_seed(step), device="cpu")
        with deferred_gradients(optimizers):
            layer(x).square().sum().backward()
        norms.append(clip_gradient_norm_(layer.parameters(), 1.0))
        norms.append(clip_gradient_norm_([layer.experts], 0.5))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    norms.append(clip_gradient_norm_(layer.parameters(), 1.0))
    return [*layer.state_dict().values(), *norms, layer.eval()(x)]


@pytest.fixture(params=["set", "context"])
def on_another_device(request):
    """A function that calls another one where tensors that name no device are made on "meta"."""

    def call(function, *arguments, **options):
        if request.param == "context":
            with torch.device("meta"):
                return function(*arguments, **options)
        torch.set_default_device("meta")
        try:
            return function(*arguments, **options)
        finally:
            torch.set_default_device(None)

    return call


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
@pytest.mark.parametrize(
    ("sparse", "fused", "second_moment"),
    [(False, False, "element"), (True, False, "element"), (True, True, "element"), (True, True, "row")],
)
def test_training_gives_the_same_bits(kind, sparse, fused, second_moment, on_another_device):
    options = {"sparse": sparse, "fused": fused, "second_moment": second_moment}
    for got, expected in zip(on_another_device(train, kind, **options), train(kind, **options), strict=True):
        assert got.device.type == "cpu"
        assert torch.equal(got, expected)


def test_int8_tables_and_usage_give_the_same_bits(on_another_device):
    table, x = torch.randn(9, 2, 8), torch.randn(4, 8)
    ids, weights = torch.randint(9, (4, 3)), torch.rand(4, 3)

    def run():
        vectors, scales = quantize_vectors(table)
        usage = expert_usage(weights.sum(1).double())
        return expert_mlp(x, vectors, ids, weights, "gelu", scales=scales), torch.as_tensor(usage.gini, device="cpu")

    for got, expected in zip(on_another_device(run), run(), strict=True):
        assert torch.equal(got, expected)
