"""The part in common of the layers that retrieve rows of one table by product keys: PEER and product-key memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers.feed_forward import FeedForward, Flops, ParameterCount, ParameterGroups
from tinyexperts.layers.product_key_router import ProductKeyRouter, QueryBatchNorm, Routing
from tinyexperts.ops import expert_mlp
from tinyexperts.ops.expert_mlp.column_shards import ColumnGroups, expert_mlp_in_columns
from tinyexperts.ops.expert_mlp.table_gradient import expert_mlp_deferred, is_deferred, mark_column_shard
from tinyexperts.ops.huge_pages import prefer_huge_pages

# Of a rank: with fewer, exchanging the products of the P experts costs more than the columns save.
MIN_COLUMNS = 64


class ProductKeyLayer(FeedForward):
    """A router and one table `experts` [N, E, D], of which each token reads P = H*K rows."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        vectors_per_expert: int,
        activation: str | None,
        sparse: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        self.router = ProductKeyRouter(d_model, num_experts, device=device, dtype=dtype, **router_options)
        self.activation, self.sparse = activation, sparse
        table = torch.empty(num_experts, vectors_per_expert, d_model, device=device, dtype=dtype)
        self.experts = nn.Parameter(prefer_huge_pages(table))
        self.column_groups: ColumnGroups | None = None

    def shard_columns(self, groups: ColumnGroups, *, statistics: dist.ProcessGroup | None = None) -> None:
        """Keep this rank's columns of the table alone: `experts` becomes [N, E, D / T]; call it on all ranks.

        Forward and backward passes are then made by all ranks together, each with as many tokens, and give what the
        whole layer gives. The other parameters stay whole.

        statistics: the ranks over whose tokens together query batch norm takes its statistics

        Raises:
            InputError: T does not divide D, or leaves a rank less than 64 columns.
        """
        num_shards, columns = groups.num_shards, self.experts.shape[2] // groups.num_shards
        if self.experts.shape[2] % num_shards or columns < MIN_COLUMNS:
            raise InputError(
                f"a table of {self.experts.shape[2]} columns can't be shared by {num_shards} ranks: the ranks must "
                f"divide the columns, and leave at least {MIN_COLUMNS} to each"
            )
        start = dist.get_rank(groups.columns) * columns
        part = self.experts.new_empty((*self.experts.shape[:2], columns))
        part.copy_(self.experts.detach()[:, :, start : start + columns])
        self.experts = nn.Parameter(prefer_huge_pages(part), requires_grad=self.experts.requires_grad)
        mark_column_shard(self.experts)
        self.column_groups = groups
        if isinstance(self.router.norm, QueryBatchNorm):
            self.router.norm.statistics_group = statistics

    @property
    def model_dim(self) -> int:
        """D, also where the table holds a part of its columns."""
        return self.experts.shape[2] * (1 if self.column_groups is None else self.column_groups.num_shards)

    def route(self, x: Tensor) -> Routing:
        """The experts of each token, best first: x (float, [..., D]) -> Routing, each part [..., H, K].

        In training mode this is a forward pass of the router, and moves the running statistics of its batch norm: call
        `eval()` first to look.
        """
        routing: Routing = self.router(x)
        return routing

    def forward(self, x: Tensor) -> Tensor:
        """x (float, [..., D]) -> y (same shape and dtype)."""
        routing = self.route(x)
        x_MD = x.reshape(-1, x.shape[-1])
        ids_MP, weights_MP = (t.view(x_MD.shape[0], self.retrieved_per_token) for t in (routing.ids, routing.weights))
        if self.column_groups is not None:
            y_MD = expert_mlp_in_columns(
                x_MD, self.experts, ids_MP, weights_MP, self.activation, self.column_groups, sparse=self.sparse
            )
        elif is_deferred(self.experts):
            y_MD = expert_mlp_deferred(x_MD, self.experts, ids_MP, weights_MP, self.activation)
        else:
            y_MD = expert_mlp(x_MD, self.experts, ids_MP, weights_MP, self.activation, sparse=self.sparse)
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
        num_experts, num_vectors, _ = self.experts.shape
        row = num_vectors * self.model_dim
        return ParameterCount(active=router + self.retrieved_per_token * row, total=router + num_experts * row)

    def parameter_groups(self) -> ParameterGroups:
        return ParameterGroups(dense=list(self.router.parameters()), tables=[self.experts])
