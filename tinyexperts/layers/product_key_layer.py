"""The part in common of the layers that retrieve rows of one table by product keys: PEER and product-key memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinyexperts.errors import InputError
from tinyexperts.layers.feed_forward import Flops, ParameterCount, ParameterGroups
from tinyexperts.layers.product_key_router import ProductKeyRouter, Routing
from tinyexperts.layers.query_batch_norm import QueryBatchNorm
from tinyexperts.layers.table_layer import TableBits, TableLayer, empty_integers
from tinyexperts.ops import expert_mlp
from tinyexperts.ops.activation import Activation
from tinyexperts.ops.cpu.huge_pages import prefer_huge_pages
from tinyexperts.ops.expert_mlp.columns import ColumnShard, expert_mlp_in_columns
from tinyexperts.ops.rank_groups import RankGroups

# The least columns of a rank: with fewer, exchanging the products of the P experts costs more than they save.
MIN_COLUMNS = 64

# Rows of a shared table that are drawn at a time: a multiple of 16, the numbers that torch's generator draws together.
_DRAWN_ROWS = 1 << 12


class ProductKeyLayer(TableLayer):
    """A router and one table `experts` [N, E, D], of which each token reads P = H*K rows; it may be quantized.

    With `ranks` the layer is one of those that all ranks make together. `experts` is this rank's columns of the table
    alone, [N, E, D / T]; the other parameters are whole. Forward and backward passes are called by all ranks together,
    each with as many tokens, and give what one layer gives for the tokens of all: outputs, the table's gradient, the
    statistics of query batch norm. Gradients of the other parameters are of the rank's own tokens: to be summed.

    A batch of padded sequences takes a `mask` (bool, the leading dimensions of x; True: a real token). Query batch norm
    alone uses it, where it takes statistics of the batch: of the real tokens only, so that these have the outputs and
    gradients that they have without padding. Masked-out tokens get outputs too, normalized by the same statistics; keep
    them out of the loss. With fewer than two real tokens, the running statistics are used, and stay.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        vectors_per_expert: int,
        activation: Activation | None,
        sparse: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        ranks: RankGroups | None,
        table_bits: TableBits | None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        self.router = ProductKeyRouter(d_model, num_experts, device=device, dtype=dtype, **router_options)
        self.activation, self.sparse, self.ranks = activation, sparse, ranks
        if table_bits is None:
            columns = d_model if ranks is None else _columns_of_a_rank(d_model, ranks.num_shards)
            table = torch.empty(num_experts, vectors_per_expert, columns, device=device, dtype=dtype)
            self._set_numbers((ColumnShard if columns < d_model else nn.Parameter)(prefer_huge_pages(table)))
        else:
            _check_not_shared(ranks)
            integers = empty_integers(num_experts, vectors_per_expert, d_model, table_bits, device)
            self._set_integers(*integers, dim=d_model)
        if ranks is not None and isinstance(self.router.norm, QueryBatchNorm):
            self.router.norm.statistics_group = ranks.all_ranks

    @torch.no_grad()
    def _draw_experts(self, std: float, generator: torch.Generator | None) -> None:
        """Draw normal numbers; of a shared table those of the whole one, which is drawn in parts and not kept.

        A quantized table is for what it loads, and becomes zero.
        """
        if self.experts.is_meta:
            return
        if self.scales is not None:
            self.scales.zero_()
            return
        if self.ranks is None:
            self.experts.normal_(std=std, generator=generator)
            return
        own = self.ranks.own_columns(self.model_dim)
        for part in torch.split(self.experts, _DRAWN_ROWS):
            whole = part.new_empty(*part.shape[:2], self.model_dim).normal_(std=std, generator=generator)
            part.copy_(whole[:, :, own])

    @property
    def model_dim(self) -> int:
        """D, also where the table holds a part of its columns."""
        return self._table_dim * (1 if self.ranks is None else self.ranks.num_shards)

    def check_quantizable(self) -> None:
        _check_not_shared(self.ranks)
        super().check_quantizable()

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Choose the experts of each token, best first.

        In training mode this is a forward pass of the router. It moves the running statistics of its batch norm, unless
        that is frozen: call `eval()` first to look.

        Args:
            x (float, [..., D]): the tokens.
            mask (bool, [...]): True for real tokens, as in `forward`.

        Returns:
            The Routing, each part [..., H, K].

        Raises:
            InputError: a mask that `forward` refuses.
        """
        routing: Routing = self.router(x) if mask is None else self.router(x, mask)
        return routing

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the layer's output for each token.

        Args:
            x (float, [..., D]): the tokens.
            mask (bool, [...]): True for real tokens, False for padding, which query batch norm ignores.

        Returns:
            y (dtype of x, [..., D]): the outputs.

        Raises:
            InputError: a mask that is not bool, of the leading dimensions of x, on its device; a layer with sparse
                gradients in DistributedDataParallel.
        """
        if self.sparse and self.experts.requires_grad and torch.is_grad_enabled():
            _check_summed_by_its_wrapper()
        routing = self.route(x, mask)
        x_MD = x.reshape(-1, x.shape[-1])
        ids_MP, weights_MP = (t.view(x_MD.shape[0], self.retrieved_per_token) for t in (routing.ids, routing.weights))
        if self.ranks is not None:
            y_MD = expert_mlp_in_columns(
                x_MD, self.experts, ids_MP, weights_MP, self.activation, self.ranks, sparse=self.sparse
            )
        else:
            y_MD = expert_mlp(
                x_MD, self.experts, ids_MP, weights_MP, self.activation, scales=self.scales, sparse=self.sparse
            )
        return y_MD.view(x.shape)

    @property
    def retrieved_per_token(self) -> int:
        """P = H*K."""
        return self.router.num_heads * self.router.experts_per_head

    def flops_per_token(self) -> Flops:
        return Flops(
            router=self.router.flops_per_token(),
            experts=2 * self.retrieved_per_token * self.experts.shape[1] * self.model_dim,
        )

    def num_parameters(self) -> ParameterCount:
        router = self.router.num_parameters()
        num_experts, num_vectors = self.experts.shape[:2]
        row = num_vectors * self.model_dim
        return ParameterCount(active=router + self.retrieved_per_token * row, total=router + num_experts * row)

    def parameter_groups(self) -> ParameterGroups:
        tables = [self.experts] if isinstance(self.experts, nn.Parameter) else []
        return ParameterGroups(dense=list(self.router.parameters()), tables=tables)


def _check_summed_by_its_wrapper() -> None:
    """Refuse DistributedDataParallel, which sums the sparse gradients of nn.Embedding alone and fails at others.

    Raises:
        InputError: the forward pass is one of DistributedDataParallel.
    """
    if dist.is_available() and DistributedDataParallel._active_ddp_module is not None:
        raise InputError(
            "DistributedDataParallel can't sum the sparse gradient of a table of experts: make the layer with "
            "sparse=False, and train the table with AdamW"
        )


def _check_not_shared(ranks: RankGroups | None) -> None:
    if ranks is not None:
        raise InputError(
            f"a quantized table is not shared by ranks, got {ranks.num_shards} that share the columns: quantize the "
            "whole model on one rank"
        )


def _columns_of_a_rank(width: int, num_shards: int) -> int:
    columns = width // num_shards
    if width % num_shards or (num_shards > 1 and columns < MIN_COLUMNS):
        raise InputError(
            f"a table of {width} columns can't be shared by {num_shards} ranks: the ranks must divide the columns, and "
            f"leave at least {MIN_COLUMNS} to each"
        )
    return columns
