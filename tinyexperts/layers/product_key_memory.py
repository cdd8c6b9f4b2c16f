"""Product-key memory, the paper's PKM baseline: Lample et al. 2019 (arXiv 1907.05242)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.layers.product_key_router import QueryNorm, RouterWeights
from tinyexperts.layers.table_layer import TableBits
from tinyexperts.ops.rank_groups import RankGroups


class ProductKeyMemory(ProductKeyLayer):
    """A feed-forward layer whose output is a weighted sum of H*K retrieved value vectors, which don't look at x.

    By default softmax weights over each head's K, and sub-keys that the heads share, as in the paper's PEER, so that
    the two differ in the experts alone. `experts` [N, 1, D] holds the values.

    Args:
        d_model (int): width D.
        num_experts (int): N, a square.
        num_heads (int): H queries a token, whose outputs are summed.
        experts_per_head (int): K <= sqrt(N).
        query_dim (int): Q, even.
        query_norm (str): "batch", "layer", "layer_halves" or "none"; as in PEER, with its `mask`, and its rule for a
            frozen batch norm.
        router_weights (str): "softmax" over a head's K scores, "sigmoid" or "relu" of each score.
        shared_sub_keys (bool): one set of product keys for all heads, or one a head (Lample et al.).
        sparse (bool): give the gradient of the values as a sparse_coo tensor of the touched rows.
        ranks (RankGroups | None): the processes that share the layer's work, and its table by columns (see
            ProductKeyLayer).
        table_bits (int | None): 8 or 4 for a quantized table, which is zero until it is loaded, and is not trained
            (see TableLayer).

    Raises:
        InputError: num_experts not a square, query_dim odd, experts_per_head > sqrt(num_experts), an unknown option,
            ranks that do not divide d_model or have less than 64 columns each, or that would share a quantized table.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int = 1024**2,
        *,
        num_heads: int = 8,
        experts_per_head: int = 32,
        query_dim: int = 128,
        query_norm: QueryNorm = "batch",
        router_weights: RouterWeights = "softmax",
        shared_sub_keys: bool = True,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ranks: RankGroups | None = None,
        table_bits: TableBits | None = None,
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            vectors_per_expert=1,
            activation=None,
            num_heads=num_heads,
            experts_per_head=experts_per_head,
            query_dim=query_dim,
            query_norm=query_norm,
            router_weights=router_weights,
            shared_sub_keys=shared_sub_keys,
            sparse=sparse,
            device=device,
            dtype=dtype,
            ranks=ranks,
            table_bits=table_bits,
        )
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values normal of variance 1 / D (Lample et al.)."""
        self.router.reset_parameters(generator)
        self._draw_experts(1 / math.sqrt(self.model_dim), generator)


@dataclass(frozen=True, kw_only=True)
class ProductKeyMemoryConfig:
    """A product-key memory."""

    kind: ClassVar[str] = "product_key_memory"
    """The name of this kind of layer in files."""
    num_experts: int = 1024**2
    """Values, a square."""
    num_heads: int = 8
    """Queries a token."""
    experts_per_head: int = 32
    """Values that each query retrieves."""
    query_dim: int = 128
    """Width of a query, even."""
    query_norm: QueryNorm = "batch"
    """Normalization of the queries."""
    router_weights: RouterWeights = "softmax"
    """The function that turns scores into router weights."""
    shared_sub_keys: bool = True
    """One set of product keys for all heads, as in the paper's PEER."""
    table_bits: TableBits | None = None
    """Bits of an element of a quantized table, for inference; default: a table of numbers, which can be trained."""

    def build(
        self,
        d_model: int,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        ranks: RankGroups | None = None,
    ) -> ProductKeyMemory:
        """Make the layer."""
        return ProductKeyMemory(d_model, **vars(self), sparse=sparse, device=device, ranks=ranks)
