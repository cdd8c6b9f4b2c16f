"""The router that PEER and product-key memory share: query network, its norm, and exact product-key retrieval.

Source: the paper (arXiv 2407.04153), section 2; its query batch norm is in query_batch_norm.py.
The paper leaves the query's width, its bias and the initialization open: here no bias (batch norm would remove it),
normal queries of variance 1 / D, and unit-norm sub-keys, so that scores start with a variance of about 2 whatever Q is.
"""

from __future__ import annotations

import math
import numbers
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers.feed_forward import check_mask
from tinyexperts.layers.query_batch_norm import QueryBatchNorm
from tinyexperts.ops import product_key_topk

QueryNorm = Literal["batch", "layer", "layer_halves", "none"]
RouterWeights = Literal["softmax", "sigmoid", "relu"]


class Routing(NamedTuple):
    """The experts of each token and head, best first; each [..., H, K]."""

    ids: Tensor
    """The experts' ids (int64)."""
    scores: Tensor
    """The products query . key (fp32; fp64 in an fp64 layer)."""
    weights: Tensor
    """The factors of the experts' outputs (dtype of the scores)."""


class ProductKeyRouter(nn.Module):
    """Queries of the tokens, and the K experts whose product keys score highest for each.

    Parameters: `query.weight` [H*Q, D]; `sub_keys` [2, S, Q/2] shared by the heads, or [H, 2, S, Q/2]; the norm's.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        num_heads: int,
        experts_per_head: int,
        query_dim: int,
        query_norm: QueryNorm = "batch",
        router_weights: RouterWeights = "softmax",
        shared_sub_keys: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        counts = {"number of experts": num_experts, "num_heads": num_heads, "query_dim": query_dim}
        for name, value in {**counts, "experts retrieved a head": experts_per_head, "d_model": d_model}.items():
            if not isinstance(value, numbers.Integral):
                raise InputError(f"{name} must be a whole number, got {value!r}")
        num_sub_keys = math.isqrt(max(num_experts, 0))
        if num_experts < 1 or num_sub_keys**2 != num_experts:
            squares = [s**2 for s in (num_sub_keys, num_sub_keys + 1) if s > 0]
            raise InputError(
                f"the number of experts must be a square (its product keys are pairs), got {num_experts}; "
                f"the nearest squares are {' and '.join(str(square) for square in squares)}"
            )
        if d_model < 1 or num_heads < 1:
            raise InputError(f"d_model and num_heads must be at least 1, got {d_model} and {num_heads}")
        if query_dim < 2 or query_dim % 2:
            raise InputError(
                f"query_dim must be even and at least 2 (one half meets each set of sub-keys), got {query_dim}"
            )
        if not 1 <= experts_per_head <= num_sub_keys:
            raise InputError(
                f"experts retrieved a head must be between 1 and sqrt(number of experts) = {num_sub_keys}, "
                f"got {experts_per_head}"
            )
        if query_norm not in get_args(QueryNorm):
            raise InputError(f"query_norm must be one of {', '.join(get_args(QueryNorm))}, got {query_norm!r}")
        if router_weights not in get_args(RouterWeights):
            raise InputError(
                f"router_weights must be one of {', '.join(get_args(RouterWeights))}, got {router_weights!r}"
            )
        self.num_heads, self.query_dim, self.num_sub_keys = num_heads, query_dim, num_sub_keys
        self.experts_per_head, self.router_weights, self.query_norm = experts_per_head, router_weights, query_norm
        self.query = nn.Linear(d_model, num_heads * query_dim, bias=False, device=device, dtype=dtype)
        self.norm: nn.Module = nn.Identity()
        if query_norm == "batch":
            self.norm = QueryBatchNorm(num_heads * query_dim, device=device, dtype=dtype)
        elif query_norm == "layer":
            self.norm = nn.LayerNorm(query_dim, device=device, dtype=dtype)
        elif query_norm == "layer_halves":
            self.norm = nn.LayerNorm(query_dim // 2, device=device, dtype=dtype)
        key_sets = (2,) if shared_sub_keys else (num_heads, 2)
        self.sub_keys = nn.Parameter(torch.empty(*key_sets, num_sub_keys, query_dim // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw normal queries of variance 1 / D; sub-keys uniform on the unit sphere; the norm as torch makes it."""
        if self.sub_keys.is_meta:  # torch takes 10 ms to draw nothing
            return
        nn.init.normal_(self.query.weight, std=1 / math.sqrt(self.query.in_features), generator=generator)
        nn.init.normal_(self.sub_keys, generator=generator)
        with torch.no_grad():
            self.sub_keys.copy_(F.normalize(self.sub_keys, dim=-1))
        if isinstance(self.norm, (nn.BatchNorm1d, nn.LayerNorm)):
            self.norm.reset_parameters()

    def queries(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the normalized queries.

        Args:
            x (float, [..., D]): the tokens.
            mask (bool, [...]): as in ProductKeyLayer.

        Returns:
            queries (float, [M, H, Q]): M is the product of the leading dimensions of x.
        """
        if mask is not None:
            check_mask(mask, x)
        query_MC: Tensor = self.query(x.reshape(-1, x.shape[-1]))
        # By the option and not by the norm's class: a norm may be wrapped or replaced (compiled, synchronized).
        if self.query_norm == "batch":
            query_MC = self.norm(query_MC) if mask is None else self._normed_by_real_tokens(query_MC, mask.reshape(-1))
        query_MHQ = query_MC.view(-1, self.num_heads, self.query_dim)
        if self.query_norm == "layer":
            query_MHQ = self.norm(query_MHQ)
        elif self.query_norm == "layer_halves":
            query_MHQ = self.norm(query_MHQ.view(-1, self.num_heads, 2, self.query_dim // 2)).flatten(-2)
        return query_MHQ

    def _normed_by_real_tokens(self, query_MC: Tensor, mask_M: Tensor) -> Tensor:
        own = any(isinstance(each, QueryBatchNorm) for each in self.norm.modules())  # itself, or in a wrapper
        if self.norm.training and not own:
            raise InputError(
                f"a mask needs the layer's own query batch norm, got one replaced by {type(self.norm).__name__} "
                "(for the statistics of all ranks there is layers.share_query_statistics)"
            )
        normed: Tensor = self.norm(query_MC, mask_M) if own else self.norm(query_MC)
        return normed

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Choose the experts of each token; arguments as in ProductKeyLayer.route."""
        scores, ids = product_key_topk(self.queries(x, mask), self.sub_keys, self.experts_per_head)
        if self.router_weights == "softmax":
            weights = scores.softmax(-1)
        else:
            weights = scores.sigmoid() if self.router_weights == "sigmoid" else scores.relu()
        shape = (*x.shape[:-1], self.num_heads, self.experts_per_head)
        return Routing(*(t.view(shape) for t in (ids, scores, weights)))

    def flops_per_token(self) -> int:
        """Count the FLOPs of the query network and the scores of all sub-keys of both halves."""
        return 2 * self.query.weight.numel() + 2 * self.num_heads * self.num_sub_keys * self.query_dim

    def num_parameters(self) -> int:
        """Count the parameters, all of which take part in every token."""
        return sum(parameter.numel() for parameter in self.parameters())
