"""Exact retrieval with product keys in plain torch, for devices without a kernel of their own.

It must match reference.py, but looks at few of the N = S^2 sums. With both halves sorted, (i+1)(j+1) pairs score at
least as much as the pair of places (i, j), counted from 0, so only pairs with (i+1)(j+1) <= K can be *above* the K-th
score. Pairs *equal* to the K-th score may be outside, since sums round to fp32: rows with such a tie are found by
looking at the frontier of the candidates and settled apart. A sum of opposite infinities is NaN, which has no place in
the order: rows with one among their candidates keep what these gave.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the scores (both halves, all heads) that one chunk of tokens may hold: 16 MiB of fp32 on the CPU, and
# 512 MiB elsewhere, where each chunk costs the launches of some 30 kernels.
_CHUNK_ELEMENTS = 1 << 22
_CHUNK_ELEMENTS_OF_ACCELERATORS = 1 << 27
# Pairs that one chunk of tied rows may hold: 8 MiB of ids on the CPU, 256 MiB elsewhere.
_CHUNK_TIES = 1 << 20
_CHUNK_TIES_OF_ACCELERATORS = 1 << 25


def half_scores(query_MHQ: Tensor, sub_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of the sub-keys of each half, both [M, H, S] in fp32 (fp64 for fp64 queries)."""
    dtype = torch.promote_types(query_MHQ.dtype, torch.float32)
    query_1, query_2 = query_MHQ.to(dtype).chunk(2, dim=-1)
    keys = sub_keys.to(dtype)
    if keys.dim() == 3:  # [2, S, Q/2], shared by the heads
        return query_1 @ keys[0].T, query_2 @ keys[1].T
    return (
        torch.einsum("mhq,hsq->mhs", query_1, keys[:, 0]),
        torch.einsum("mhq,hsq->mhs", query_2, keys[:, 1]),
    )


def candidate_places(k: int, num_places: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the pairs of places that can be in the top k, and the frontier: the best pairs that are not among them."""
    candidates = [(i, j) for i in range(min(k, num_places)) for j in range(min(k // (i + 1), num_places))]
    frontier = [(i, k // (i + 1)) for i in range(min(k + 1, num_places)) if k // (i + 1) < num_places]
    return candidates, frontier


def _top_k_of_sums(scores_1: Tensor, scores_2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the top k of all sums of two rows, both [F, K], from scores [F, S] a half."""
    with torch.no_grad():
        chosen = _ids_of_top_k(scores_1, scores_2, k)
    return _sums_at(scores_1, scores_2, chosen), chosen


def _sums_at(scores_1: Tensor, scores_2: Tensor, ids: Tensor) -> Tensor:
    """Return the scores of ids [F, K]; the gradient of each reaches the halves of its own pair alone, ties or not."""
    num_sub_keys = scores_1.shape[-1]
    return scores_1.gather(1, ids // num_sub_keys) + scores_2.gather(1, ids % num_sub_keys)


def _ids_of_top_k(scores_1: Tensor, scores_2: Tensor, k: int) -> Tensor:
    sums, ids, beyond = _candidates(scores_1, scores_2, *_places(scores_1, k))
    top, position = sums.topk(min(k + 1, sums.shape[-1]))
    chosen = ids.gather(1, position[:, :k])

    tied_inside = (top[:, 1:] == top[:, :-1]).any(1)
    tied_outside = (beyond == top[:, k - 1 : k]).any(1)
    settled: Tensor = _with_ties_settled(chosen, tied_inside, tied_outside, scores_1, scores_2, sums, ids)
    return settled


def _places(scores: Tensor, k: int) -> tuple[int, Tensor, Tensor]:
    """Return how many places of a half are looked at, the candidates and the frontier, on the device of the scores."""
    num_places = min(k + 1, scores.shape[-1])
    # From memory of the host, "non_blocking" copies what is so short without waiting for the device.
    candidates, frontier = (
        torch.tensor(pairs, device="cpu").to(scores.device, non_blocking=True)
        for pairs in candidate_places(k, num_places)
    )
    return num_places, candidates, frontier


def _candidates(
    scores_1: Tensor, scores_2: Tensor, num_places: int, candidates: Tensor, frontier: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates' sums and ids, both [F, C], and the sums of the frontier, [F, ..]."""
    num_sub_keys = scores_1.shape[-1]
    best_1, index_1 = scores_1.topk(num_places)
    best_2, index_2 = scores_2.topk(num_places)
    sums = best_1[:, candidates[:, 0]] + best_2[:, candidates[:, 1]]
    ids = index_1[:, candidates[:, 0]] * num_sub_keys + index_2[:, candidates[:, 1]]
    beyond = best_1[:, frontier[:, 0]] + best_2[:, frontier[:, 1]] if len(frontier) else sums[:, :0]
    return sums, ids, beyond


# Which rows tie depends on the data, so this is not compiled. The public decorator, torch.compiler.disable, imports the
# compiler at once: 2 s for everyone who imports the layer.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _with_ties_settled(
    chosen: Tensor,
    tied_inside: Tensor,
    tied_outside: Tensor,
    scores_1: Tensor,
    scores_2: Tensor,
    sums: Tensor,
    ids: Tensor,
) -> Tensor:
    """Return the chosen ids [F, K]; ties among the candidates, or with pairs outside of them, go to the lowest ids."""
    k, num_sub_keys = chosen.shape[1], scores_1.shape[1]
    if tied_inside.any():
        chosen[tied_inside] = _sorted_by_score_and_id(sums[tied_inside], ids[tied_inside], k)
    # NaN sorts above all and equals nothing: such rows keep what the candidates gave.
    tied_outside = tied_outside & ~sums.amax(1).isnan()
    for rows in torch.split(tied_outside.nonzero().flatten(), max(1, _CHUNK_TIES // (k * num_sub_keys))):
        chosen[rows] = _settle_ties(scores_1[rows], scores_2[rows], sums[rows], ids[rows], k)
    return chosen


def _sorted_by_score_and_id(scores: Tensor, ids: Tensor, k: int) -> Tensor:
    ids, order = ids.sort(dim=1)
    by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, by_score[:, :k])


def _settle_ties(scores_1: Tensor, scores_2: Tensor, sums: Tensor, ids: Tensor, k: int) -> Tensor:
    """Return the ids of the candidates above the K-th score, and of all N pairs that equal it those of lowest ids."""
    num_sub_keys = scores_1.shape[-1]
    threshold = sums.topk(k).values[:, -1:]
    # Each first half that can reach the threshold holds at least one pair that does. Fewer than K pairs are above it,
    # so the lowest first halves, K in number, hold all the ties that can be wanted.
    reaches = scores_1 + scores_2.amax(1, keepdim=True) >= threshold
    first = (~reaches).to(torch.int8).sort(dim=1, stable=True).indices[:, :k]
    ties = scores_1.gather(1, first).unsqueeze(2) + scores_2.unsqueeze(1) == threshold.unsqueeze(2)
    no_id = num_sub_keys * num_sub_keys
    tie_ids = first.unsqueeze(2) * num_sub_keys + torch.arange(num_sub_keys, device=first.device)
    tie_ids = tie_ids.masked_fill(~ties, no_id).flatten(1).topk(k, largest=False).values
    tie_scores = torch.where(tie_ids < no_id, threshold, float("-inf"))

    below = sums <= threshold
    all_ids = torch.cat([ids.masked_fill(below, no_id), tie_ids], 1)
    all_scores = torch.cat([sums.masked_fill(below, float("-inf")), tie_scores], 1)
    return _sorted_by_score_and_id(all_scores, all_ids, k)


def tokens_per_chunk(num_heads: int, num_sub_keys: int, *, on_cpu: bool = True) -> int:
    """Return the number of tokens whose scores fit a chunk, so that [M, H, S] never exists whole."""
    elements = _CHUNK_ELEMENTS if on_cpu else _CHUNK_ELEMENTS_OF_ACCELERATORS
    return max(1, elements // (2 * num_heads * num_sub_keys))


def product_key_topk(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the top k experts of each query, both [M, H, K]; autograd can differentiate it."""
    if query_MHQ.device.type != "cpu":
        return _with_one_wait(query_MHQ, sub_keys, k)
    num_heads = query_MHQ.shape[1]
    scores, ids = [], []
    for chunk in torch.split(query_MHQ, tokens_per_chunk(num_heads, sub_keys.shape[-2])):
        scores_1, scores_2 = half_scores(chunk, sub_keys)
        top_scores, top_ids = _top_k_of_sums(scores_1.flatten(0, 1), scores_2.flatten(0, 1), k)
        scores.append(top_scores.view(len(chunk), num_heads, k))
        ids.append(top_ids.view(len(chunk), num_heads, k))
    return torch.cat(scores), torch.cat(ids)


def _with_one_wait(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Retrieve as product_key_topk, but ask an accelerator only once, at the end, which rows tie.

    To ask means to wait until all that was asked for before is done.
    """
    num_heads, num_sub_keys = query_MHQ.shape[1], sub_keys.shape[-2]
    scores, ids, tied = [], [], []
    for chunk in torch.split(query_MHQ, tokens_per_chunk(num_heads, num_sub_keys, on_cpu=False)):
        scores_1, scores_2 = (half.flatten(0, 1) for half in half_scores(chunk, sub_keys))
        with torch.no_grad():
            sums, candidate_ids, beyond = _candidates(scores_1, scores_2, *_places(scores_1, k))
            chosen = _sorted_by_score_and_id(sums, candidate_ids, k)
            tied_outside = (beyond == sums.topk(k).values[:, -1:]).any(1)
            tied.append(tied_outside & ~sums.amax(1).isnan())
        scores.append(_sums_at(scores_1, scores_2, chosen))
        ids.append(chosen)
    settled: tuple[Tensor, Tensor] = _with_tied_rows_settled(
        torch.cat(scores), torch.cat(ids), torch.cat(tied), query_MHQ, sub_keys
    )
    top_scores, top_ids = (each.view(len(query_MHQ), num_heads, k) for each in settled)
    return top_scores, top_ids


@torch._disable_dynamo  # type: ignore[attr-defined]
def _with_tied_rows_settled(
    scores: Tensor, ids: Tensor, tied: Tensor, query_MHQ: Tensor, sub_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the scores and ids [F, K]; rows that tie outside of the candidates are computed again from their query."""
    k, num_heads, num_sub_keys = ids.shape[1], query_MHQ.shape[1], sub_keys.shape[-2]
    most_rows = min(
        _CHUNK_TIES_OF_ACCELERATORS // (k * num_sub_keys), tokens_per_chunk(num_heads, num_sub_keys, on_cpu=False)
    )
    for rows in torch.split(tied.nonzero().flatten(), max(1, most_rows)):
        # The scores of all heads, so that it makes no difference whether they share their sub-keys.
        tokens, heads = rows // num_heads, rows % num_heads
        each = torch.arange(len(rows), device=rows.device)
        scores_1, scores_2 = (half[each, heads] for half in half_scores(query_MHQ[tokens], sub_keys))
        with torch.no_grad():
            sums, candidate_ids, _ = _candidates(scores_1, scores_2, *_places(scores_1, k))
            chosen = _settle_ties(scores_1, scores_2, sums, candidate_ids, k)
        scores = scores.index_copy(0, rows, _sums_at(scores_1, scores_2, chosen))
        ids = ids.index_copy(0, rows, chosen)
    return scores, ids


def product_key_topk_backward(
    grad_scores: Tensor, ids: Tensor, query_MHQ: Tensor, sub_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the queries and of the sub-keys, of which only chosen ones take part."""
    num_heads, half_dim = query_MHQ.shape[1], sub_keys.shape[-1]
    num_sub_keys = sub_keys.shape[-2]
    dtype = grad_scores.dtype
    shared = sub_keys.dim() == 3
    keys = sub_keys.to(dtype).view(-1, 2, num_sub_keys, half_dim)
    grad_query = torch.empty_like(query_MHQ, dtype=dtype, memory_format=torch.contiguous_format)
    grad_keys = torch.zeros_like(keys, memory_format=torch.contiguous_format)
    chunk = tokens_per_chunk(num_heads, 2 * ids.shape[-1] * half_dim, on_cpu=query_MHQ.device.type == "cpu")
    for start in range(0, len(query_MHQ), chunk):
        tokens = slice(start, start + chunk)
        grad = grad_scores[tokens]
        for half, index in enumerate((ids[tokens] // num_sub_keys, ids[tokens] % num_sub_keys)):
            columns = slice(half * half_dim, (half + 1) * half_dim)
            query = query_MHQ[tokens, :, columns].to(dtype)
            for head in range(num_heads):
                table = 0 if shared else head
                chosen = keys[table, half][index[:, head]]
                grad_query[tokens, head, columns] = torch.einsum("mk,mkq->mq", grad[:, head], chosen)
                contribution = grad[:, head].unsqueeze(-1) * query[:, head].unsqueeze(1)
                grad_keys[table, half].index_add_(0, index[:, head].flatten(), contribution.flatten(0, 1))
    return grad_query.to(query_MHQ.dtype), grad_keys.view_as(sub_keys).to(sub_keys.dtype)
