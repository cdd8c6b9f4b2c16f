"""The routings of a model's product-key layers, told as a forward pass makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.layers.product_key_router import Routing


def product_key_layers(model: nn.Module) -> dict[str, ProductKeyLayer]:
    """Return the product-key layers of a model, found by their class, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ProductKeyLayer)}


@contextmanager
def told_routings(model: nn.Module, tell: Callable[[str, Tensor, Routing], None]) -> Iterator[None]:
    """Tell of each product-key layer's routing while open.

    Args:
        model (nn.Module): the model.
        tell (Callable[[str, Tensor, Routing], None]): called in each forward pass with the layer's name, its tokens
            (float [..., D]) and their routing.
    """
    handles = []
    try:
        for name, layer in product_key_layers(model).items():

            def hook(_router: nn.Module, inputs: tuple[Tensor, ...], routing: Routing, name: str = name) -> None:
                tell(name, inputs[0], routing)

            handles.append(layer.router.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
