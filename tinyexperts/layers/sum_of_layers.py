"""The sum of several layers of the same input, such as heads that have a table of experts each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers.feed_forward import FeedForward, Flops, ParameterCount, ParameterGroups


class SumOfLayers(FeedForward):
    """y = layer_1(x) + ... + layer_n(x).

    Args:
        layers (Iterable[FeedForward]): layers of one width.

    Raises:
        InputError: no layer, or something else than a feed-forward layer of this package.
    """

    def __init__(self, layers: Iterable[FeedForward]) -> None:
        super().__init__()
        parts = list(layers)
        others = [type(part).__name__ for part in parts if not isinstance(part, FeedForward)]
        if not parts or others:
            raise InputError(f"layers must be feed-forward layers, at least one, got {', '.join(others) or 'none'}")
        self.layers = nn.ModuleList(parts)

    @property
    def _parts(self) -> list[FeedForward]:
        return [cast(FeedForward, part) for part in self.layers]  # or a wrapper of one, as torch.compile makes it

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (float, [..., D]) -> y (same shape and dtype); each layer has the mask (bool, [...]) of real tokens."""
        inputs = (x,) if mask is None else (x, mask)
        first, *others = self._parts
        y: Tensor = first(*inputs)
        for part in others:
            y = y + part(*inputs)
        return y

    def flops_per_token(self) -> Flops:
        flops = [part.flops_per_token() for part in self._parts]
        return Flops(router=sum(each.router for each in flops), experts=sum(each.experts for each in flops))

    def num_parameters(self) -> ParameterCount:
        counts = [part.num_parameters() for part in self._parts]
        return ParameterCount(active=sum(each.active for each in counts), total=sum(each.total for each in counts))

    def parameter_groups(self) -> ParameterGroups:
        groups = [part.parameter_groups() for part in self._parts]
        return ParameterGroups(
            dense=[parameter for group in groups for parameter in group.dense],
            tables=[parameter for group in groups for parameter in group.tables],
        )
