"""Recorded experts: their factors times their v give the layer's output, at every token."""

from __future__ import annotations

import pytest
import torch

from tinyexperts.evaluation import recorded_firing
from tinyexperts.layers import PEER, ProductKeyMemory

SIZES = {"num_heads": 2, "experts_per_head": 3, "query_dim": 6}
LAYERS = {
    "peer": lambda: PEER(8, 64, **SIZES),
    "gated": lambda: PEER(8, 64, **SIZES, gated=True, activation="silu", router_weights="sigmoid"),
    "memory": lambda: ProductKeyMemory(8, 64, **SIZES),
}


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_factors_times_v_are_the_layers_output(kind, bits, kernels) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().eval()
    if bits is not None:
        layer.quantize_(bits)
    model = torch.nn.Sequential(layer)
    with torch.no_grad(), recorded_firing(model) as firing:
        model(torch.randn(1, 2, 8))
        output = model(x := torch.randn(3, 5, 8))
    (found,) = firing.values()
    assert found.ids.shape == (3, 5, 2, 3)
    expected = torch.einsum("bthk,bthkd->btd", found.factors, layer.vectors_of(found.ids)[..., -1, :])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.router_weights, layer.route(x).weights)
    if kind == "memory":
        assert (found.activations == 1).all()


def test_nothing_is_recorded_afterwards() -> None:
    model = torch.nn.Sequential(LAYERS["peer"]())
    with pytest.raises(ZeroDivisionError), recorded_firing(model) as firing:
        raise ZeroDivisionError
    model(torch.randn(1, 2, 8))
    assert firing == {}
