"""The part in common of the layers that retrieve rows of one table by product keys: PEER and product-key memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyexperts.layers.feed_forward import FeedForward, Flops, ParameterCount, ParameterGroups
from tinyexperts.layers.product_key_router import ProductKeyRouter, Routing
from tinyexperts.ops import expert_mlp
from tinyexperts.ops.expert_mlp.table_gradient import expert_mlp_deferred, is_deferred
from tinyexperts.ops.huge_pages import prefer_huge_pages


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
        if is_deferred(self.experts):
            y_MD = expert_mlp_deferred(x_MD, self.experts, ids_MP, weights_MP, self.activation)
        else:
            y_MD = expert_mlp(x_MD, self.experts, ids_MP, weights_MP, self.activation, sparse=self.sparse)
        return y_MD.view(x.shape)

    @property
    def retrieved_per_token(self) -> int:
        """P = H*K."""
        return self.router.num_heads * self.router.experts_per_head

    def flops_per_token(self) -> Flops:
        _, num_vectors, model_dim = self.experts.shape
        return Flops(
            router=self.router.flops_per_token(), experts=2 * self.retrieved_per_token * num_vectors * model_dim
        )

    def num_parameters(self) -> ParameterCount:
        router = self.router.num_parameters()
        active = self.retrieved_per_token * self.experts[0].numel()
        return ParameterCount(active=router + active, total=router + self.experts.numel())

    def parameter_groups(self) -> ParameterGroups:
        return ParameterGroups(dense=list(self.router.parameters()), tables=[self.experts])
