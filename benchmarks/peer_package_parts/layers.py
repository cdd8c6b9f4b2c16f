"""The layers of PEER-pytorch 0.2.2 and product-key-memory 0.3.0, made to sizes that are named as ours are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import PEER_pytorch
import torch
import torch.nn.functional as F
from product_key_memory import PKM
from torch import Tensor, nn

from tinyexperts.layers import FeedForward, from_peer_pytorch, from_product_key_memory
from tinyexperts.layers.feed_forward import Flops, ParameterCount


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a layer with product keys."""

    d_model: int
    num_experts: int
    num_heads: int = 8
    experts_per_head: int = 16
    query_dim: int = 128


def peer_pytorch(sizes: Sizes, **options: Any) -> Any:
    """Make their PEER: by default a single expert a head, as its own default is."""
    return PEER_pytorch.PEER(
        sizes.d_model,
        heads=sizes.num_heads,
        num_experts=sizes.num_experts,
        num_experts_per_head=sizes.experts_per_head,
        dim_key=sizes.query_dim // 2,
        **options,
    )


@torch.no_grad()
def peer_pytorch_started_as_ours(sizes: Sizes) -> nn.Module:
    """Make their PEER of K experts a head, with initial weights drawn as those of ours instead of N(0, 1) tables."""
    layer = peer_pytorch(sizes, non_competing_scores=False)
    std = 1 / math.sqrt(sizes.d_model)
    nn.init.normal_(layer.weight_down_embed.weight, std=std)
    nn.init.normal_(layer.weight_up_embed.weight, std=std / 2)
    nn.init.normal_(layer.to_queries[0].weight, std=std)
    layer.keys.copy_(F.normalize(torch.randn_like(layer.keys), dim=-1))
    return layer


def product_key_memory(sizes: Sizes, **options: Any) -> nn.Module:
    """Make their PKM."""
    return PKM(
        sizes.d_model,
        heads=sizes.num_heads,
        num_keys=math.isqrt(sizes.num_experts),
        topk=sizes.experts_per_head,
        dim_head=sizes.query_dim // 2,
        **options,
    )


def imported(theirs: nn.Module) -> FeedForward:
    """Make our layer with copies of their weights."""
    ours = (from_peer_pytorch if isinstance(theirs, PEER_pytorch.PEER) else from_product_key_memory)(theirs)
    assert isinstance(ours, FeedForward)
    return ours


class Foreign(FeedForward):
    """A layer of theirs under our contract; its costs are those of its twin, the layer that it is imported as."""

    def __init__(self, theirs: nn.Module, twin: FeedForward) -> None:
        super().__init__()
        self.theirs = theirs
        self._flops, self._count = twin.flops_per_token(), twin.num_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None  # there is no padding here
        y: Tensor = self.theirs(x if x.dim() == 3 else x[None]).view(x.shape)
        return y

    def flops_per_token(self) -> Flops:
        return self._flops

    def num_parameters(self) -> ParameterCount:
        return self._count


def tables_of(theirs: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """Return the modules that hold their tables."""
    return [module for module in theirs.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
