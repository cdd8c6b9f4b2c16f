"""Exact retrieval with product keys on the CPU; must match reference.py, ties included.

The scores are torch's matrix products, a chunk of tokens at a time so that they stay in the cache. The best of a half
are found without sorting it: the maxima of some columns of the row give a threshold that enough elements reach, few
elements are above it, and the place of each is the number of better ones. The candidate pairs (portable.py) are ranked
the same way. Rows in which equal scores, NaN or infinities decide are rare; ties.py settles them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.ops.cpu.compile import array_of, array_of_weights, exact_inlined, exact_kernel, kernel
from tinyexperts.ops.cpu.threads import parallel_for
from tinyexperts.ops.product_key_topk.portable import candidate_places
from tinyexperts.ops.product_key_topk.simd import (
    COLUMN_LANES,
    MASK_LANES,
    RANK_LANES,
    count_larger,
    lowest_bit,
    mask_of_reaching,
    maxima_of_columns,
)
from tinyexperts.ops.product_key_topk.ties import top_k_of_sums_with_ties

# Elements of both halves' scores in one chunk: 2 MiB of fp32.
_CHUNK_ELEMENTS = 1 << 19
# Rows of scores that are worth a part of their own.
_MIN_ROWS = 32
# The gradient of the sub-keys is summed in at most this many parts, each of at least _MIN_TOKENS tokens: the number of
# tokens alone decides, so that the bits don't depend on the number of threads.
_MAX_GRADIENT_PARTS = 8
_MIN_TOKENS = 32


def product_key_topk(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and ids of the top k experts of each query, both [M, H, K]."""
    num_tokens, num_heads, _ = query_MHQ.shape
    num_sub_keys, half_dim = sub_keys.shape[-2:]
    dtype = torch.promote_types(query_MHQ.dtype, torch.float32)
    query = query_MHQ.to(dtype).contiguous().view(num_tokens, num_heads, 2, half_dim)
    keys = sub_keys.to(dtype).transpose(-1, -2)
    # Shared keys serve the queries of all heads in one product; otherwise each head has products of its own.
    groups = (
        [(query.view(-1, 2, half_dim), keys)]
        if keys.dim() == 3
        else [(query[:, head], keys[head]) for head in range(num_heads)]
    )
    # A row is one query and head.
    num_rows = len(groups[0][0])
    num_places = min(k + 1, num_sub_keys)
    num_columns = _num_columns(num_places, num_sub_keys)
    candidates, frontier = _candidate_places(k, num_places)
    # Rows are padded to whole lanes with -inf, so that the kernels need no loop for a rest.
    lanes = MASK_LANES if num_columns else RANK_LANES
    padded = -(-num_sub_keys // lanes) * lanes
    chunk = max(1, min(num_rows, _CHUNK_ELEMENTS // (2 * padded)))
    halves = torch.empty((2, chunk, padded), dtype=dtype, device="cpu")
    if padded > num_sub_keys:
        halves[:, :, num_sub_keys:] = -torch.inf
    unsettled = np.empty(chunk, dtype=np.bool_)
    top_scores = torch.empty((num_tokens, num_heads, k), dtype=dtype, device="cpu")
    ids = torch.empty((num_tokens, num_heads, k), dtype=torch.int64, device="cpu")
    scores, out_scores, out_ids = array_of(halves), array_of(top_scores.view(-1, k)), array_of(ids.view(-1, k))
    for group, (rows, group_keys) in enumerate(groups):
        for first in range(0, num_rows, chunk):
            # The scores of both halves at once, into memory that is used again for each chunk.
            queries = rows[first : first + chunk].transpose(0, 1)
            torch.bmm(queries, group_keys, out=halves[:, : queries.shape[1], :num_sub_keys])
            ranks = scores, num_sub_keys, num_places, candidates, frontier
            out = first * len(groups) + group, len(groups), out_scores, out_ids
            parallel_for(_top_k_of_sums, queries.shape[1], *ranks, num_columns, *out, unsettled, min_items=_MIN_ROWS)
            # The exact order, one score after the other, for the few rows that the fast way has not settled.
            tied_rows = unsettled[: queries.shape[1]].nonzero()[0]
            if len(tied_rows):
                parallel_for(top_k_of_sums_with_ties, len(tied_rows), *ranks, tied_rows, *out, min_items=_MIN_ROWS)
    return top_scores, ids


def product_key_topk_backward(
    grad_scores: Tensor, ids: Tensor, query_MHQ: Tensor, sub_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the queries and of the sub-keys, of which only chosen ones take part."""
    num_tokens = len(query_MHQ)
    dtype = grad_scores.dtype
    keys = sub_keys.to(dtype).view(-1, 2, *sub_keys.shape[-2:])
    grad_query = torch.empty(query_MHQ.shape, dtype=dtype, device="cpu")
    num_parts = max(1, min(_MAX_GRADIENT_PARTS, num_tokens // _MIN_TOKENS))
    grad_keys = torch.empty((num_parts, *keys.shape), dtype=dtype, device="cpu")
    parallel_for(
        _backward,
        num_parts,
        array_of(grad_scores),
        array_of(ids),
        array_of(query_MHQ.to(dtype)),
        array_of_weights(keys),
        array_of(grad_query),
        array_of(grad_keys),
    )
    total = grad_keys[0]
    for part in grad_keys[1:]:
        total += part
    return grad_query.to(query_MHQ.dtype), total.view(sub_keys.shape).to(sub_keys.dtype)


@functools.cache
def _candidate_places(k: int, num_places: int) -> tuple[Any, Any]:
    candidates, frontier = candidate_places(k, num_places)
    return np.array(candidates, dtype=np.uintp).reshape(-1, 2), np.array(frontier, dtype=np.uintp).reshape(-1, 2)


def _num_columns(num_places: int, num_sub_keys: int) -> int:
    """Return the number of columns whose maxima give the threshold; 0 for a row too short for two elements a column.

    It is half as many again as values are wanted.
    """
    columns = -(-3 * num_places // (2 * COLUMN_LANES)) * COLUMN_LANES
    return columns if 2 * columns <= num_sub_keys else 0


@exact_kernel
def _top_k_of_sums(
    scores: Any,
    num_sub_keys: int,
    num_places: int,
    candidates: Any,
    frontier: Any,
    num_columns: int,
    first_out: int,
    out_stride: int,
    out_scores: Any,
    out_ids: Any,
    unsettled: Any,
    start: int,
    stop: int,
) -> None:
    """Find the top k of the sums of rows start..stop of the scores [2, C, S], which are padded with -inf.

    unsettled[row] is True for a row that is for ties.py.
    """
    scores_1, scores_2 = scores[0], scores[1]
    num_candidates, k = np.uintp(len(candidates)), out_scores.shape[1]
    dtype, zero = scores_1.dtype, scores_1.dtype.type(0)
    found = max(scores_1.shape[1], len(candidates)) + MASK_LANES
    maxima, counts = np.empty(found, dtype=dtype), np.empty(found, dtype=np.int32)
    values, positions = np.empty(found, dtype=dtype), np.empty(found, dtype=np.uintp)
    # One place more: everything that isn't among the best goes there.
    best_1, index_1 = np.empty(num_places + 1, dtype=dtype), np.empty(num_places + 1, dtype=np.uintp)
    best_2, index_2 = np.empty(num_places + 1, dtype=dtype), np.empty(num_places + 1, dtype=np.uintp)
    top, top_ids = np.empty(k + 1, dtype=dtype), np.empty(k + 1, dtype=np.uintp)
    for row in range(start, stop):
        # The best k + 1 of each half, in order: one more than candidates want, for the frontier.
        settled = _best_of_row(scores_1, row, num_columns, maxima, values, positions, counts, best_1, index_1)
        settled &= _best_of_row(scores_2, row, num_columns, maxima, values, positions, counts, best_2, index_2)
        if settled:
            # The sums and ids of the candidate pairs. Infinity times zero is NaN, so `total` is 0 for finite rows.
            total = zero
            for c in range(num_candidates):
                i, j = candidates[c, 0], candidates[c, 1]
                values[c] = best_1[i] + best_2[j]
                positions[c] = index_1[i] * np.uintp(num_sub_keys) + index_2[j]
                total += values[c] * zero
            # Infinities make equal sums, and NaN, without equal halves: ties.py looks at such rows.
            settled = total == zero and _rank(values, positions, num_candidates, counts, top, top_ids)
            # A pair outside the candidates that equals the K-th score may have a lower id.
            for f in range(len(frontier)):
                settled &= best_1[frontier[f, 0]] + best_2[frontier[f, 1]] != top[k - 1]
            out = first_out + row * out_stride
            for place in range(k):
                out_scores[out, place], out_ids[out, place] = top[place], top_ids[place]
        unsettled[row] = not settled


@exact_kernel
def _best_of_row(
    scores: Any,
    row: int,
    num_columns: int,
    maxima: Any,
    values: Any,
    positions: Any,
    counts: Any,
    best: Any,
    index: Any,
) -> bool:
    """Find the best of a row, best first; return False if they aren't found or have equals (NaN equals all)."""
    # Unsigned, since numba lets signed indices count from the end, which takes longer than the work here.
    size, num_best, found = np.uintp(scores.shape[1]), len(best) - 1, np.uintp(0)
    first, stop = row * scores.shape[1], (row + 1) * scores.shape[1]
    if num_columns > 0:
        # Each column's maximum is an element of its own: at least num_best elements reach the num_best-th largest
        # maximum, so that all of the best are among those that reach it.
        for column in range(0, num_columns, COLUMN_LANES):
            maxima_of_columns(scores, first + column, stop, num_columns, maxima, column)
        for column in range(0, num_columns, RANK_LANES):
            count_larger(maxima, num_columns, column, counts)
        # The maximum that exactly num_best - 1 exceed. With equal maxima there may be none: then all reach -inf.
        threshold = -scores.dtype.type(np.inf)
        for column in range(num_columns):
            threshold = maxima[column] if counts[column] == num_best - 1 else threshold
        # The positions of the elements that reach it, read off one bit each.
        for block in range(np.uintp(0), size, np.uintp(MASK_LANES)):
            mask = mask_of_reaching(scores, first + block, threshold)
            for _ in range(3):  # seldom more; without a branch, since a wrong guess would cost more than the work
                positions[found] = block + lowest_bit(mask)
                found += np.uintp(mask != 0)
                mask &= mask - np.uint64(1)
            while mask != 0:
                positions[found] = block + lowest_bit(mask)
                found += np.uintp(1)
                mask &= mask - np.uint64(1)
        # Ranking compares all with all, which is too much for many equal elements.
        if found > 4 * num_best + 64:
            return False
        for a in range(found):
            values[a] = scores[row, positions[a]]
    else:  # short enough to rank all of it
        found = size
        for a in range(size):
            values[a], positions[a] = scores[row, a], a
    return _rank(values, positions, found, counts, best, index)


@exact_inlined
def _rank(values: Any, ids: Any, num_values: Any, counts: Any, best: Any, best_ids: Any) -> bool:
    """Put each value at the place that is the number of larger ones; return False if equal values want one place."""
    num_best, sum_of_places = np.uintp(len(best) - 1), np.uintp(0)
    for first in range(np.uintp(0), num_values, np.uintp(RANK_LANES)):
        count_larger(values, num_values, first, counts)
    # What isn't among the best goes to the place behind them; no branch, as the order is random.
    for a in range(num_values):
        place = min(np.uintp(counts[a]), num_best)
        best[place], best_ids[place] = values[a], ids[a]
        sum_of_places += place
    # Equal values all want the lowest of their places, which lowers the sum.
    sum_if_distinct = num_best * (num_best - np.uintp(1)) // np.uintp(2) + (num_values - num_best) * num_best
    return bool(sum_of_places == sum_if_distinct)


@kernel
def _backward(
    grad_scores: Any, ids: Any, query: Any, keys: Any, grad_query: Any, grad_keys: Any, start: int, stop: int
) -> None:
    """Compute the gradients of the parts start..stop of the tokens, each with sub-keys' gradients of its own."""
    num_tokens, num_heads, k = ids.shape
    num_sub_keys, half_dim = keys.shape[2:]
    num_parts = len(grad_keys)
    for part in range(start, stop):
        grad_keys[part] = 0
        for m in range(part * num_tokens // num_parts, (part + 1) * num_tokens // num_parts):
            for head in range(num_heads):
                table = head if len(keys) > 1 else 0
                grad_query[m, head] = 0
                for place in range(k):
                    # The score is q1 . c_i + q2 . c'_j: its gradient goes to both halves of the query, and to the two
                    # sub-keys that were chosen.
                    grad = grad_scores[m, head, place]
                    i, j = ids[m, head, place] // num_sub_keys, ids[m, head, place] % num_sub_keys
                    for d in range(half_dim):
                        grad_query[m, head, d] += grad * keys[table, 0, i, d]
                        grad_keys[part, table, 0, i, d] += grad * query[m, head, d]
                    for d in range(half_dim):
                        grad_query[m, head, half_dim + d] += grad * keys[table, 1, j, d]
                        grad_keys[part, table, 1, j, d] += grad * query[m, head, half_dim + d]
