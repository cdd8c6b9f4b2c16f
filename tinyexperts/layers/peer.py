"""PEER, parameter efficient expert retrieval: "Mixture of A Million Experts" (He 2024, arXiv 2407.04153), section 2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.layers.product_key_router import QueryNorm, RouterWeights
from tinyexperts.layers.table_layer import TableBits
from tinyexperts.ops.activation import Activation, check_activation
from tinyexperts.ops.rank_groups import RankGroups


class PEER(ProductKeyLayer):
    """A feed-forward layer of N single-neuron experts, of which each token retrieves H*K by product keys.

    y = sum over heads and retrieved experts of g * act(u . x) v, g the router weight; heads share the experts and, by
    default, the sub-keys. Expert (i, j) of the S x S product keys is row i*S + j of `experts` [N, 2, D], which holds
    (u, v) side by side; [N, 3, D] with (u, w, v) and act(u . x) (w . x) v when gated.

    `layer(x, mask)`, mask (bool, the leading dimensions of x) True for real tokens, is for batches of padded sequences:
    it keeps padding out of query batch norm's statistics (see ProductKeyLayer). Packed sequences, as those of this
    package's trainer, have no padding and need none. Under DistributedDataParallel each process takes its own
    statistics, unless tinyexperts.layers.share_query_statistics(model) was called.

    Args:
        d_model (int): width D.
        num_experts (int): N, a square.
        num_heads (int): H independent queries a token, whose outputs are summed.
        experts_per_head (int): K <= sqrt(N).
        query_dim (int): Q, even.
        query_norm (str): "batch" (the paper's query BN), "layer" (each head's query alone), "layer_halves" (each half
            of it alone, all halves with the same Q/2 gains and biases) or "none". Batch norm uses the batch's
            statistics in training and running ones in evaluation. It is frozen when none of its own parameters
            (router.norm's) requires a gradient: then it uses and keeps the running ones in training too.
        router_weights (str): "softmax" over a head's K scores (the paper), "sigmoid" or "relu" of each score.
        activation (str): "gelu", "relu", "relu2" or "silu"; the paper doesn't say which it used.
        gated (bool): gated experts, named by the paper as an easy extension.
        shared_sub_keys (bool): one set of product keys for all heads (the paper), or one a head.
        sparse (bool): give the gradient of `experts` as a sparse_coo tensor of the touched rows, as
            nn.Embedding(sparse=True); train it with tinyexperts.optim.RowSparseAdam or torch.optim.SparseAdam. Dense by
            default, for any loop.
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
        experts_per_head: int = 16,
        query_dim: int = 128,
        query_norm: QueryNorm = "batch",
        router_weights: RouterWeights = "softmax",
        activation: Activation = "gelu",
        gated: bool = False,
        shared_sub_keys: bool = True,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ranks: RankGroups | None = None,
        table_bits: TableBits | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__(
            d_model,
            num_experts,
            vectors_per_expert=3 if gated else 2,
            activation=activation,
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
        """Draw u (and w) normal of variance 1 / D, so that u . x starts at unit variance; v of a quarter of it.

        The paper does not say; the first runs at small scale were made with this quarter.
        """
        self.router.reset_parameters(generator)
        self._draw_experts(1 / math.sqrt(self.model_dim), generator)
        if self.table_bits is None:
            with torch.no_grad():
                self.experts[:, -1].mul_(0.5)


@dataclass(frozen=True, kw_only=True)
class PEERConfig:
    """A PEER layer."""

    kind: ClassVar[str] = "peer"
    """The name of this kind of layer in files."""
    num_experts: int = 1024**2
    """Single-neuron experts, a square."""
    num_heads: int = 8
    """Queries a token."""
    experts_per_head: int = 16
    """Experts that each query retrieves."""
    query_dim: int = 128
    """Width of a query, even."""
    query_norm: QueryNorm = "batch"
    """Normalization of the queries."""
    router_weights: RouterWeights = "softmax"
    """The function that turns scores into router weights."""
    activation: Activation = "gelu"
    """Activation of the experts."""
    gated: bool = False
    """Gated neurons as experts."""
    shared_sub_keys: bool = True
    """One set of product keys for all heads, as in the paper."""
    table_bits: TableBits | None = None
    """Bits of an element of a quantized table, for inference; default: a table of numbers, which can be trained."""

    def build(
        self,
        d_model: int,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        ranks: RankGroups | None = None,
    ) -> PEER:
        """Make the layer."""
        return PEER(d_model, **vars(self), sparse=sparse, device=device, ranks=ranks)
