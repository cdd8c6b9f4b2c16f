"""Exact retrieval with product keys on GPUs; must match reference.py, ties included.

The scores are torch's matrix products in full fp32, a chunk of tokens at a time so that they stay in the device's L2
cache. `triton_select.select` finds the best of each row of scores, `triton_pairs.pairs` the top k of their sums. The
gradients are weighted sums of the chosen sub-keys, and sums by sub-key over the queries that chose it: what expert_mlp
computes of experts with one vector. Nothing waits for the device, and equal inputs give equal bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tinyexperts.ops.expert_mlp.gpu import ExpertsPlan, plan_weighted_sum, weighted_sum
from tinyexperts.ops.expert_mlp.gpu_sums import SumsPlan, plan_sum_by_row, sum_by_row
from tinyexperts.ops.gpu.dispatch import BeyondLimits, GpuKernel
from tinyexperts.ops.gpu.full_precision import full_precision
from tinyexperts.ops.gpu.limits import FLOATS
from tinyexperts.ops.product_key_topk.portable import candidate_places
from tinyexperts.ops.product_key_topk.triton_pairs import pairs
from tinyexperts.ops.product_key_topk.triton_select import select

# Elements of the scores (both halves, all heads) that one chunk of tokens may hold: 32 MiB of fp32.
_CHUNK_ELEMENTS = 1 << 23
# Candidate pairs are compared all with all, so many at a time as registers hold.
_COMPARISONS = 4096
_MAX_K = 32
_MAX_INT32 = 2**31 - 1
_EXAMPLE_TOKENS = 3


@dataclass(frozen=True)
class TopKPlan:
    """The sizes that the kernels of product_key_topk are compiled for; those of the kernels' own are said there."""

    num_sub_keys: int
    k: int
    in_fours: bool
    num_best: int
    fours: int
    slots: int
    num_candidates: int
    num_frontier: int
    candidates: int
    compared: int
    frontier: int
    ties_block: int


@dataclass(frozen=True)
class BackwardPlan:
    """The plans of the sums that the backward pass is made of."""

    grad_query: ExpertsPlan
    grad_keys: SumsPlan


def _plan(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> TopKPlan:
    num_sub_keys = sub_keys.shape[-2]
    _check_limits(query_MHQ, sub_keys, k)
    num_best = min(k + 1, num_sub_keys)
    candidates, frontier = candidate_places(k, num_best)
    num_places = max(32, triton.next_power_of_2(len(candidates)))
    return TopKPlan(
        num_sub_keys,
        k,
        num_sub_keys % 4 == 0,
        num_best,
        fours=min(4, max(1, triton.next_power_of_2(num_sub_keys) // 128)),
        # Of random scores 1.1 (k = 8) to 1.4 (k = 32) times as many as are wanted reach the threshold of `select`.
        slots=max(32, triton.next_power_of_2(triton.cdiv(3 * num_best, 2))),
        num_candidates=len(candidates),
        num_frontier=len(frontier),
        candidates=num_places,
        compared=min(num_places, _COMPARISONS // num_places),
        frontier=max(32, triton.next_power_of_2(max(1, len(frontier)))),
        ties_block=min(128, triton.next_power_of_2(num_sub_keys)),
    )


def _check_limits(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> None:
    """Raise BeyondLimits for operands that the kernels don't take."""
    num_rows = query_MHQ.shape[0] * query_MHQ.shape[1]
    num_sub_keys = sub_keys.shape[-2]
    for dtype in (query_MHQ.dtype, sub_keys.dtype):
        if dtype not in FLOATS:
            raise BeyondLimits(f"the kernels take fp32, bf16 and fp16, got {dtype}")
    if k > _MAX_K:
        raise BeyondLimits(f"the kernels retrieve up to {_MAX_K} experts for a query, got k = {k}")
    if query_MHQ.numel() == 0:
        raise BeyondLimits(f"the kernels take no empty operands, got queries {list(query_MHQ.shape)}")
    if num_sub_keys**2 > _MAX_INT32:
        raise BeyondLimits(f"the ids of the experts must fit 32 bits, got {num_sub_keys}^2 experts")
    # Each pair of a query and an expert meets both halves' sub-keys.
    if 2 * num_rows * k > _MAX_INT32:
        raise BeyondLimits(f"2 x queries x k must be less than 2^31, got {num_rows} queries and k = {k}")


def _top_k(plan: TopKPlan, query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, _ = query_MHQ.shape
    device, num_sub_keys = query_MHQ.device, plan.num_sub_keys
    keys = sub_keys.to(torch.float32)
    candidates, frontier = _places(k, plan.num_best, device)
    top_scores = torch.empty((num_tokens, num_heads, k), dtype=torch.float32, device=device)
    ids = torch.empty((num_tokens, num_heads, k), dtype=torch.int64, device=device)
    chunk = min(num_tokens, max(1, _CHUNK_ELEMENTS // (2 * num_heads * num_sub_keys)))
    # Used again for each chunk, so that it stays in the cache.
    num_rows = 2 * chunk * num_heads
    scores = torch.empty((num_rows, num_sub_keys), dtype=torch.float32, device=device)
    best = torch.empty((num_rows, plan.num_best), dtype=torch.float32, device=device)
    index = torch.empty((num_rows, plan.num_best), dtype=torch.int32, device=device)
    slots = torch.empty((num_rows, plan.slots), dtype=torch.int32, device=device)
    for start in range(0, num_tokens, chunk):
        tokens = slice(start, start + chunk)
        query = query_MHQ[tokens].to(torch.float32)
        num_queries = len(query) * num_heads
        _write_scores(query, keys, scores[: 2 * num_queries].view(2, num_queries, num_sub_keys))
        select[(2 * num_queries,)](
            scores,
            best,
            index,
            slots,
            num_sub_keys,
            plan.in_fours,
            plan.num_best,
            plan.fours,
            plan.slots,
            num_warps=1,
        )
        pairs[(num_queries,)](
            scores,
            best,
            index,
            candidates,
            frontier,
            top_scores[tokens],
            ids[tokens],
            num_sub_keys,
            k,
            plan.num_best,
            plan.num_candidates,
            plan.num_frontier,
            plan.candidates,
            plan.compared,
            plan.frontier,
            plan.ties_block,
            num_warps=1,
        )
    return top_scores, ids


def _write_scores(query_MHQ: Tensor, keys: Tensor, scores: Tensor) -> None:
    """Write the scores of both halves [2, M*H, S]; everything is fp32."""
    num_tokens, num_heads, query_dim = query_MHQ.shape
    halves = query_MHQ.reshape(num_tokens, num_heads, 2, query_dim // 2)
    with full_precision():
        if keys.dim() == 3:  # [2, S, Q/2], shared by the heads
            torch.bmm(halves.flatten(0, 1).transpose(0, 1), keys.transpose(1, 2), out=scores)
            return
        for half, of_half in enumerate(scores.view(2, num_tokens, num_heads, -1)):
            torch.bmm(halves[:, :, half].transpose(0, 1), keys[:, half].transpose(1, 2), out=of_half.transpose(0, 1))


@functools.cache
def _places(k: int, num_best: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the candidates and the frontier (int32, [.., 2]); cached, since the capture of a graph can't make them."""
    candidates, frontier = candidate_places(k, num_best)
    first, second = (
        torch.tensor(places or [(0, 0)], dtype=torch.int32, device=device) for places in (candidates, frontier)
    )
    return first, second


def _example(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
    """Return integers, whose products are exact in fp32: few equal scores, many, and only equal ones."""
    draw = torch.Generator(query_MHQ.device).manual_seed(0)
    query = _integers((_EXAMPLE_TOKENS, *query_MHQ.shape[1:]), 8, query_MHQ, draw)
    query[1].sign_()
    query[2].zero_()
    return query, _integers(sub_keys.shape, 8, sub_keys, draw), k


def _integers(shape: tuple[int, ...], largest: int, like: Tensor, draw: torch.Generator) -> Tensor:
    numbers = torch.randint(-largest, largest + 1, shape, generator=draw, device=like.device)
    return numbers.to(like.dtype)


PRODUCT_KEY_TOPK = GpuKernel(_plan, _top_k, _example)
"""Retrieval by Triton's kernels; the arguments are those of portable.product_key_topk."""


def _backward_plan(grad_scores: Tensor, ids: Tensor, query_MHQ: Tensor, sub_keys: Tensor) -> BackwardPlan:
    k = ids.shape[-1]
    _check_limits(query_MHQ, sub_keys, k)
    if grad_scores.dtype != torch.float32:
        raise BeyondLimits(f"the kernels take fp32 gradients of the scores, got {grad_scores.dtype}")
    num_halves, half_dim = 2 * ids.shape[0] * ids.shape[1], sub_keys.shape[-1]
    return BackwardPlan(
        plan_weighted_sum(num_halves, k, half_dim, sub_keys.dtype, query_MHQ.dtype),
        plan_sum_by_row(num_halves * k, half_dim, query_MHQ.dtype),
    )


def _backward(
    plan: BackwardPlan, grad_scores: Tensor, ids: Tensor, query_MHQ: Tensor, sub_keys: Tensor
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, k = ids.shape
    num_sub_keys, half_dim = sub_keys.shape[-2:]
    # A table of all sub-keys, in which each half of a query chooses k rows.
    table = sub_keys.reshape(-1, half_dim).contiguous()
    first_row = torch.zeros((num_heads, 2), dtype=torch.int64, device=ids.device)
    first_row[:, 1] = num_sub_keys
    if sub_keys.dim() == 4:
        first_row += torch.arange(num_heads, device=ids.device).unsqueeze(1) * 2 * num_sub_keys
    rows = torch.stack([ids // num_sub_keys, ids % num_sub_keys], 2) + first_row.unsqueeze(-1)
    rows = rows.view(num_tokens * num_heads * 2, k)
    factors = grad_scores.unsqueeze(2).expand(-1, -1, 2, -1).reshape(rows.shape)
    halves = query_MHQ.reshape(-1, half_dim).contiguous()
    grad_query = weighted_sum(plan.grad_query, table, rows, factors)
    grad_keys = sum_by_row(plan.grad_keys, rows, factors, halves, len(table))
    return grad_query.view(query_MHQ.shape), grad_keys.view(sub_keys.shape).to(sub_keys.dtype)


def _backward_example(
    grad_scores: Tensor, ids: Tensor, query_MHQ: Tensor, sub_keys: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator(ids.device).manual_seed(0)
    shape = (_EXAMPLE_TOKENS, *ids.shape[1:])
    chosen = torch.randint(0, sub_keys.shape[-2] ** 2, shape, generator=draw, device=ids.device)
    query = _integers((_EXAMPLE_TOKENS, *query_MHQ.shape[1:]), 8, query_MHQ, draw)
    return _integers(shape, 8, grad_scores, draw), chosen, query, _integers(sub_keys.shape, 8, sub_keys, draw)


PRODUCT_KEY_TOPK_BACKWARD = GpuKernel(_backward_plan, _backward, _backward_example)
"""Its gradients; the arguments are those of portable.product_key_topk_backward."""
