"""How many of the true top-k each layer retrieves: its ids against a look at the scores of all N.

The ids are those that reach the tables, caught there; queries and sub-keys are read from the same layer, and the truth
is computed from them in fp64. An id counts if no k others score higher, beyond what fp32 rounds: among equal scores any
choice is right. An expert that is retrieved twice counts once, and one that is missing is a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from peer_package_parts.layers import Sizes, peer_pytorch, product_key_memory, tables_of
from tinyexperts.layers import PEER, ProductKeyMemory

# Scores in fp32 of sums of 2 * 64 products of a size of about 1; relative to the largest score of the query.
_ROUNDING = 1e-5
_SCORES_AT_A_TIME = 1 << 23
QUERIES = ("random", "ties", "clusters")


@dataclass(frozen=True, kw_only=True)
class ExactnessConfig:
    """The sizes that are tried."""

    num_experts: tuple[int, ...] = (2**12, 2**16, 2**20)
    experts_per_head: tuple[int, ...] = (8, 16, 32)
    num_tokens: int = 32
    num_heads: int = 4
    query_dim: int = 32


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A layer's retrieval, opened: all of one forward pass."""

    query: Tensor
    """The queries [M, H, Q], normalized as the layer does."""
    sub_keys: Tensor
    """The sub-keys of each half [H, 2, S, Q/2]."""
    ids: Tensor
    """The ids that reach the table [M, H, K]."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layer with its options."""

    label: str
    make: Callable[[Sizes], nn.Module]
    open: Callable[[nn.Module, Tensor], Retrieval]


def of_ours(layer: Any, x_MD: Tensor) -> Retrieval:
    """Open our layer."""
    layer.eval()
    keys = layer.router.sub_keys
    return Retrieval(
        query=layer.router.queries(x_MD),
        sub_keys=keys.expand(layer.router.num_heads, *keys.shape[-3:]),
        ids=layer.route(x_MD).ids,
    )


def of_peer_pytorch(layer: Any, x_MD: Tensor) -> Retrieval:
    """Open a PEER of PEER-pytorch."""
    ids = _caught_ids(layer, x_MD)
    query_PMHC = layer.to_queries(layer.norm(x_MD[None]))[:, 0]
    return Retrieval(query=_both_halves(query_PMHC), sub_keys=layer.keys.transpose(1, 2), ids=ids)


def of_product_key_memory(layer: Any, x_MD: Tensor) -> Retrieval:
    """Open a PKM of product-key-memory."""
    ids = _caught_ids(layer, x_MD)
    query_PHMC = layer.norm(layer.to_queries(x_MD).view(len(x_MD), 2, layer.heads, -1).permute(1, 2, 0, 3))
    return Retrieval(
        query=_both_halves(query_PHMC.transpose(1, 2)),
        sub_keys=layer.keys.transpose(1, 2),
        ids=ids.view(len(x_MD), layer.heads, -1),
    )


def _caught_ids(layer: nn.Module, x_MD: Tensor) -> Tensor:
    """Return the ids with which a forward pass reads the first of the tables: [M, H, K] or [M, H K]."""
    caught: list[Tensor] = []
    handle = tables_of(layer)[0].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    layer(x_MD[None])
    handle.remove()
    return caught[0].view(len(x_MD), *caught[0].shape[caught[0].dim() - 2 :]) if caught[0].dim() > 2 else caught[0]


def _both_halves(query_PMHC: Tensor) -> Tensor:
    return query_PMHC.permute(1, 2, 0, 3).flatten(2)


CANDIDATES = (
    Candidate(
        label="tinyexperts PEER",
        make=lambda sizes: PEER(
            sizes.d_model,
            sizes.num_experts,
            num_heads=sizes.num_heads,
            experts_per_head=sizes.experts_per_head,
            query_dim=sizes.query_dim,
            query_norm="none",
        ),
        open=of_ours,
    ),
    Candidate(
        label="tinyexperts product-key memory",
        make=lambda sizes: ProductKeyMemory(
            sizes.d_model,
            sizes.num_experts,
            num_heads=sizes.num_heads,
            experts_per_head=sizes.experts_per_head,
            query_dim=sizes.query_dim,
            query_norm="layer_halves",
        ),
        open=of_ours,
    ),
    Candidate(label="PEER-pytorch, default", make=peer_pytorch, open=of_peer_pytorch),
    Candidate(
        label="PEER-pytorch, `non_competing_scores=False`",
        make=lambda sizes: peer_pytorch(sizes, non_competing_scores=False),
        open=of_peer_pytorch,
    ),
    Candidate(
        label="the same, `product_key_topk` = k / 2",
        make=lambda sizes: peer_pytorch(
            sizes, non_competing_scores=False, product_key_topk=max(1, sizes.experts_per_head // 2)
        ),
        open=of_peer_pytorch,
    ),
    Candidate(label="product-key-memory, default", make=product_key_memory, open=of_product_key_memory),
    Candidate(
        label="the same, `differentiable_topk=True`",
        make=lambda sizes: product_key_memory(sizes, differentiable_topk=True),
        open=of_product_key_memory,
    ),
)


@torch.no_grad()
def draw_keys_and_queries(layer: nn.Module, sizes: Sizes, kind: str, num_tokens: int, seed: int) -> Tensor:
    """Give a layer sub-keys of a kind, and return tokens (fp32 [M, D]) whose queries are of this kind.

    D is the width of all queries, and the query network hands the tokens through, but for the order of their numbers.
    Random: all normal. Ties: tokens and sub-keys are -1, 0 or 1, and scores few whole numbers (but for a layer norm).
    Clusters: sub-keys near eight directions, of different lengths, and tokens near these directions, as after training.
    """
    generator = torch.Generator().manual_seed(seed)
    (query,) = (
        module for module in layer.modules() if isinstance(module, nn.Linear) and "quer" in _name(layer, module)
    )
    keys = next(parameter for name, parameter in layer.named_parameters() if name.endswith("keys"))
    width = sizes.query_dim // 2
    query.weight.copy_(torch.eye(len(query.weight)))
    num_halves = num_tokens * sizes.num_heads * 2
    if kind == "random":
        keys.copy_(torch.randn(keys.shape, generator=generator))
        halves = torch.randn(num_halves, width, generator=generator)
    elif kind == "ties":
        keys.copy_(torch.randint(-1, 2, keys.shape, generator=generator))
        halves = torch.randint(-1, 2, (num_halves, width), generator=generator).float()
    else:
        centers = torch.randn(8, width, generator=generator)
        of_keys = torch.randint(8, keys.shape[:-1], generator=generator)
        lengths = torch.rand(*keys.shape[:-1], 1, generator=generator) + 0.5
        keys.copy_(lengths * (centers[of_keys] + 0.1 * torch.randn(keys.shape, generator=generator)))
        of_queries = torch.randint(8, (num_halves,), generator=generator)
        halves = centers[of_queries] + 0.3 * torch.randn(num_halves, width, generator=generator)
    return halves.view(num_tokens, -1)


def _name(layer: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in layer.named_modules() if each is module)


def share_of_true_topk(found: Retrieval, k: int) -> float:
    """Return the share of the true top-k that was retrieved, in the mean over tokens and heads.

    Args:
        found (Retrieval): the queries, sub-keys and ids of a forward pass.
        k (int): experts that were asked for.
    """
    query_MHPC = found.query.double().unflatten(-1, (2, -1))
    scores_MHPS = torch.einsum("mhpc,hpsc->mhps", query_MHPC, found.sub_keys.double())
    num_sub_keys = scores_MHPS.shape[-1]
    shares = []
    rows = max(1, _SCORES_AT_A_TIME // (num_sub_keys**2 * scores_MHPS.shape[1]))
    for halves, ids in zip(scores_MHPS.split(rows), found.ids.split(rows), strict=True):
        scores_MHN = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).flatten(2)
        last_MH1 = scores_MHN.topk(k).values[..., -1:] - _ROUNDING * scores_MHN.abs().amax(-1, keepdim=True)
        sorted_ids = ids.sort(-1).values
        is_first = torch.ones_like(sorted_ids, dtype=torch.bool)
        is_first[..., 1:] = sorted_ids[..., 1:] != sorted_ids[..., :-1]
        right = (is_first & (scores_MHN.gather(-1, sorted_ids) >= last_MH1)).sum(-1).clamp(max=k)
        shares.append(right.double() / k)
    return torch.cat(shares).mean().item()


@torch.no_grad()
def measure(config: ExactnessConfig, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure each layer with each kind of queries and at each size."""
    results = []
    for num_experts, k, candidate in product(config.num_experts, config.experts_per_head, CANDIDATES):
        show(f"exactness: N = {num_experts:,}, k = {k}, {candidate.label}")
        sizes = Sizes(
            d_model=config.num_heads * config.query_dim,
            num_experts=num_experts,
            num_heads=config.num_heads,
            experts_per_head=k,
            query_dim=config.query_dim,
        )
        layer = candidate.make(sizes)
        shares = {}
        for seed, kind in enumerate(QUERIES):
            x_MD = draw_keys_and_queries(layer, sizes, kind, config.num_tokens, seed)
            shares[kind] = share_of_true_topk(candidate.open(layer, x_MD), k)
        results.append({"layer": candidate.label, "num_experts": num_experts, "k": k, "shares": shares})
    return results
