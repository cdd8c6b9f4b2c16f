"""The experts that tokens fire: router weight, activation and factor of each, recorded in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyexperts.evaluation.routings import product_key_layers, told_routings
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.layers.product_key_router import Routing
from tinyexperts.ops.activation import activate


@dataclass(frozen=True, kw_only=True)
class Firing:
    """The experts that the tokens of a forward pass retrieved in one layer; each tensor is [B, T, H, K]."""

    ids: Tensor
    """The experts' ids (int64)."""
    router_weights: Tensor
    """The router weights (float)."""
    activations: Tensor
    """The factors that the experts compute from the token (float): act(u . x), times w . x if gated. A product-key
    memory has none: 1."""

    @property
    def factors(self) -> Tensor:
        """The factors of the vectors v in the layer's output (float)."""
        return self.router_weights * self.activations


@contextmanager
def recorded_firing(model: nn.Module) -> Iterator[dict[str, Firing]]:
    """Keep the experts that the last forward pass retrieved while open.

    Args:
        model (nn.Module): the model; its product-key layers are found by their class.

    Yields:
        The Firing by the layer's name; the next forward pass replaces it.
    """
    found: dict[str, Firing] = {}
    layers = product_key_layers(model)

    def keep(name: str, x: Tensor, routing: Routing) -> None:
        activations = _activations(layers[name], x, routing.ids)
        found[name] = Firing(ids=routing.ids, router_weights=routing.weights, activations=activations)

    with told_routings(model, keep):
        yield found


@contextmanager
def counted_retrievals(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count how often the tokens of forward passes retrieve each expert while open.

    Args:
        model (nn.Module): the model; its product-key layers are found by their class.

    Yields:
        The counts (fp64 [N]) by the layer's name.
    """
    counts = {
        name: torch.zeros(len(layer.experts), dtype=torch.float64, device=layer.experts.device)
        for name, layer in product_key_layers(model).items()
    }

    def count(name: str, _x: Tensor, routing: Routing) -> None:
        counts[name] += routing.ids.flatten().bincount(minlength=len(counts[name]))

    with told_routings(model, count):
        yield counts


def _activations(layer: ProductKeyLayer, x: Tensor, ids: Tensor) -> Tensor:
    """Return the factor that each retrieved expert computes from its token."""
    if layer.activation is None:
        return torch.ones(ids.shape, dtype=x.dtype, device=x.device)
    products = torch.einsum("...hkfd,...d->...hkf", layer.vectors_of(ids, slice(0, -1)).to(x.dtype), x)
    activations = activate(products[..., 0], layer.activation)
    return activations * products[..., 1] if products.shape[-1] == 2 else activations
