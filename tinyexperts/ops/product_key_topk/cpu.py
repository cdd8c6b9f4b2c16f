"""Exact retrieval with product keys on the CPU; must match reference.py, ties included.

The scores are torch's matrix products, a chunk of tokens at a time so that they stay in the cache. The best of a half
are found without sorting it: the maxima of 64 columns of the row give a threshold that enough elements reach, few
elements are left above it, and each of those takes the place that the number of better ones says. The candidate pairs
are ranked the same way.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.ops.cpu_threads import in_parts
from tinyexperts.ops.numba_kernel import array_of, exact_inlined, exact_kernel, kernel
from tinyexperts.ops.product_key_topk.reference import candidate_ranks

# Elements of both halves' scores in one chunk: 2 MiB of fp32.
_CHUNK_ELEMENTS = 1 << 19
# Rows of scores that are worth a part of their own.
_MIN_ROWS = 32
# The gradient of the sub-keys is summed in so many parts at most, each of at least _MIN_TOKENS tokens: fixed by the
# number of tokens, so that the bits don't depend on the number of threads.
_MAX_GRADIENT_PARTS = 8
_MIN_TOKENS = 32


def product_key_topk(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and ids of the top k experts of each query, both [M, H, K]."""
    num_tokens, num_heads, query_dim = query_MHQ.shape
    num_sub_keys, half_dim = sub_keys.shape[-2:]
    dtype = torch.promote_types(query_MHQ.dtype, torch.float32)
    query = query_MHQ.to(dtype).contiguous()
    keys = sub_keys.to(dtype)
    # Shared keys serve the queries of all heads in one product; otherwise each head has products of its own.
    groups = (
        [(query.view(num_tokens * num_heads, query_dim), keys)]
        if keys.dim() == 3
        else [(query[:, head], keys[head]) for head in range(num_heads)]
    )
    scores = torch.empty((num_tokens, num_heads, k), dtype=dtype)
    ids = torch.empty((num_tokens, num_heads, k), dtype=torch.int64)
    num_ranks = min(k + 1, num_sub_keys)
    candidates, frontier = _candidate_ranks(k, num_ranks)
    num_rows = len(groups[0][0])
    chunk = max(1, min(num_rows, _CHUNK_ELEMENTS // (2 * num_sub_keys)))
    halves = torch.empty((2, chunk, num_sub_keys), dtype=dtype)
    for group, (rows, group_keys) in enumerate(groups):
        for first in range(0, num_rows, chunk):
            queries = rows[first : first + chunk]
            both = halves[:, : len(queries)]
            for half in (0, 1):
                part = queries[:, half * half_dim : (half + 1) * half_dim]
                torch.mm(part, group_keys[half].T, out=both[half])
            in_parts(
                _top_k_of_sums,
                len(queries),
                array_of(both[0]),
                array_of(both[1]),
                candidates,
                frontier,
                num_ranks,
                _num_columns(num_ranks, num_sub_keys),
                first * len(groups) + group,
                len(groups),
                array_of(scores.view(-1, k)),
                array_of(ids.view(-1, k)),
                min_items=_MIN_ROWS,
            )
    return scores, ids


def product_key_topk_backward(
    grad_scores: Tensor, ids: Tensor, query_MHQ: Tensor, sub_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and the sub-keys: only chosen sub-keys take part."""
    num_tokens = len(query_MHQ)
    dtype = grad_scores.dtype
    keys = sub_keys.to(dtype).view(-1, 2, *sub_keys.shape[-2:])
    grad_query = torch.empty(query_MHQ.shape, dtype=dtype)
    num_parts = max(1, min(_MAX_GRADIENT_PARTS, num_tokens // _MIN_TOKENS))
    grad_keys = torch.empty((num_parts, *keys.shape), dtype=dtype)
    in_parts(
        _backward,
        num_parts,
        array_of(grad_scores),
        array_of(ids),
        array_of(query_MHQ.to(dtype)),
        array_of(keys),
        array_of(grad_query),
        array_of(grad_keys),
    )
    total = grad_keys[0]
    for part in grad_keys[1:]:
        total += part
    return grad_query.to(query_MHQ.dtype), total.view(sub_keys.shape).to(sub_keys.dtype)


@functools.cache
def _candidate_ranks(k: int, num_ranks: int) -> tuple[Any, Any]:
    candidates, frontier = candidate_ranks(k, num_ranks)
    return np.array(candidates).reshape(-1, 2), np.array(frontier, dtype=np.int64).reshape(-1, 2)


def _num_columns(num_ranks: int, num_sub_keys: int) -> int:
    """Columns whose maxima give the threshold: at best some times as many as are wanted, of at least four elements.

    0 where the row is too short for as many columns as are wanted.
    """
    columns = 64
    while columns < 3 * num_ranks:
        columns *= 2
    while 4 * columns > num_sub_keys:
        columns //= 2
    return columns if columns >= num_ranks else 0


@exact_kernel
def _top_k_of_sums(
    scores_1: Any,
    scores_2: Any,
    candidates: Any,
    frontier: Any,
    num_ranks: int,
    num_columns: int,
    first_out: int,
    out_stride: int,
    out_scores: Any,
    out_ids: Any,
    start: int,
    stop: int,
) -> None:
    num_sub_keys, num_candidates = scores_1.shape[1], len(candidates)
    dtype, zero = scores_1.dtype, scores_1.dtype.type(0)
    columns, maxima = np.empty(num_columns + 1, dtype=np.uintp), np.empty(num_columns, dtype=dtype)
    values, positions = np.empty(num_sub_keys + 1, dtype=dtype), np.empty(num_sub_keys + 1, dtype=np.int64)
    counts = np.empty(max(num_columns, num_candidates, _num_crowded(num_ranks)), dtype=np.int32)
    best_1, index_1 = np.empty(num_ranks, dtype=dtype), np.empty(num_ranks, dtype=np.int64)
    best_2, index_2 = np.empty(num_ranks, dtype=dtype), np.empty(num_ranks, dtype=np.int64)
    sums, sum_ids = np.empty(num_candidates, dtype=dtype), np.empty(num_candidates, dtype=np.int64)
    top, top_ids = np.empty(out_scores.shape[1], dtype=dtype), np.empty(out_scores.shape[1], dtype=np.int64)
    for row in range(start, stop):
        _best_of_row(scores_1, row, columns, maxima, values, positions, counts, best_1, index_1)
        _best_of_row(scores_2, row, columns, maxima, values, positions, counts, best_2, index_2)
        total = zero
        for c in range(num_candidates):
            i, j = candidates[c, 0], candidates[c, 1]
            sums[c] = best_1[i] + best_2[j]
            sum_ids[c] = index_1[i] * num_sub_keys + index_2[j]
            total += sums[c] * zero
        # A total that is not zero: an infinity or NaN.
        if total != zero or not _rank_distinct(sums, sum_ids, num_candidates, counts, top, top_ids):
            _rank_one_by_one(sums, sum_ids, num_candidates, top, top_ids)
        for f in range(len(frontier)):
            if best_1[frontier[f, 0]] + best_2[frontier[f, 1]] == top[-1]:
                _settle_ties(scores_1, scores_2, row, best_2[0], top, top_ids)
                break
        out = first_out + row * out_stride
        for rank in range(len(top)):
            out_scores[out, rank], out_ids[out, rank] = top[rank], top_ids[rank]


@exact_inlined
def _num_crowded(num_best: int) -> int:
    """So many values that reach the threshold and no more are ranked by counting: it takes their square."""
    return 4 * num_best + 64


@exact_kernel
def _best_of_row(
    scores: Any, row: int, columns: Any, maxima: Any, values: Any, positions: Any, counts: Any, best: Any, index: Any
) -> None:
    """The len(best) best of a row, by (score descending, position ascending)."""
    num_found, num_nan = 0, np.int32(0)
    if len(maxima):
        # Unsigned, since numba lets signed indices count from the end, and then nothing vectorises.
        size, width = np.uintp(scores.shape[1]), np.uintp(len(maxima))
        maxima[:] = -np.inf
        grouped = size // (np.uintp(4) * width) * (np.uintp(4) * width)
        for first in range(np.uintp(0), grouped, np.uintp(4) * width):
            second, third, fourth = first + width, first + np.uintp(2) * width, first + np.uintp(3) * width
            for c in range(width):
                score0, score1 = scores[row, first + c], scores[row, second + c]
                score2, score3 = scores[row, third + c], scores[row, fourth + c]
                largest = maxima[c]
                largest = score0 if score0 > largest else largest
                largest = score1 if score1 > largest else largest
                largest = score2 if score2 > largest else largest
                maxima[c] = score3 if score3 > largest else largest
                num_nan += np.int32((score0 != score0) | (score1 != score1))
                num_nan += np.int32((score2 != score2) | (score3 != score3))
        for first in range(grouped, size, width):
            for c in range(min(width, size - first)):
                score0 = scores[row, first + c]
                maxima[c] = score0 if score0 > maxima[c] else maxima[c]
                num_nan += np.int32(score0 != score0)
        threshold = _nth_largest(maxima, len(best), counts)
        num_found = _find_above(scores, row, maxima, threshold, columns, values, positions)
    elif scores.shape[1] <= _num_crowded(len(best)):  # short enough to rank all of it
        num_found = scores.shape[1]
        for position in range(np.uintp(num_found)):
            values[position], positions[position] = scores[row, position], position
            num_nan += np.int32(values[position] != values[position])
    if (
        num_nan
        or not len(best) <= num_found <= _num_crowded(len(best))
        or not _rank_distinct(values, positions, num_found, counts, best, index)
    ):
        # NaN, too many to rank so, or equal scores.
        num_kept = 0
        for position in range(scores.shape[1]):
            num_kept = _insert(scores[row, position], position, num_kept, best, index)


@exact_inlined
def _nth_largest(values: Any, n: int, counts: Any) -> Any:
    """The n-th largest: the least of those that fewer than n exceed."""
    _count_larger(values, len(values), counts)
    threshold = values.dtype.type(np.inf)
    for a in range(len(values)):
        value = values[a] if counts[a] < n else threshold
        threshold = value if value < threshold else threshold
    return threshold


@exact_kernel
def _count_larger(values: Any, count: int, counts: Any) -> None:
    """counts[a] = how many of the first `count` values exceed values[a]; compares all pairs, without a branch."""
    for a in range(count):
        counts[a] = 0
    for b in range(0, count - 3, 4):  # four at a time: a counter is loaded and stored once for them
        value0, value1, value2, value3 = values[b], values[b + 1], values[b + 2], values[b + 3]
        for a in range(count):
            value = values[a]
            counts[a] += (np.int32(value0 > value) + np.int32(value1 > value)) + (
                np.int32(value2 > value) + np.int32(value3 > value)
            )
    for b in range(count // 4 * 4, count):
        value0 = values[b]
        for a in range(count):
            counts[a] += np.int32(value0 > values[a])


@exact_inlined
def _find_above(scores: Any, row: int, maxima: Any, threshold: Any, columns: Any, values: Any, positions: Any) -> int:
    """Gather the scores that reach the threshold, positions ascending; only columns whose maximum does are read.

    Without a branch: each score is written to the next place, which moves on where the score is to stay.
    """
    num_columns = np.uintp(0)
    for c in range(len(maxima)):
        columns[num_columns] = c
        num_columns += np.uintp(maxima[c] >= threshold)
    found = np.uintp(0)
    size, width = np.uintp(scores.shape[1]), np.uintp(len(maxima))
    whole = size // width * width
    for first in range(np.uintp(0), whole, width):
        for c in range(num_columns):
            position = first + columns[c]
            positions[found] = position
            found += np.uintp(scores[row, position] >= threshold)
    for c in range(num_columns):
        position = whole + columns[c]
        if position < size and scores[row, position] >= threshold:
            positions[found] = position
            found += np.uintp(1)
    for a in range(found):
        values[a] = scores[row, positions[a]]
    return int(found)


@exact_inlined
def _rank_distinct(values: Any, ids: Any, count: int, counts: Any, best: Any, best_ids: Any) -> bool:
    """Put each value at the place that the number of larger ones says; False where two want the same place."""
    _count_larger(values, count, counts)
    for place in range(len(best)):
        best_ids[place] = -1
    for a in range(count):
        place = counts[a]
        if place < len(best):
            if best_ids[place] >= 0:
                return False
            best[place], best_ids[place] = values[a], ids[a]
    return True


@exact_kernel
def _insert(value: Any, id_: int, num_kept: int, best: Any, best_ids: Any) -> int:
    """Insert into the best so far, NaN above all as torch sorts it; returns how many there are now."""
    place = num_kept
    while place > 0:
        other = best[place - 1]
        is_better = value > other or (value != value and other == other)
        is_equal = value == other or (value != value and other != other)
        if not (is_better or (is_equal and id_ < best_ids[place - 1])):
            break
        if place < len(best):
            best[place], best_ids[place] = other, best_ids[place - 1]
        place -= 1
    if place < len(best):
        best[place], best_ids[place] = value, id_
    return min(num_kept + 1, len(best))


@exact_kernel
def _rank_one_by_one(values: Any, ids: Any, count: int, best: Any, best_ids: Any) -> None:
    num_kept = 0
    for a in range(count):
        num_kept = _insert(values[a], ids[a], num_kept, best, best_ids)


@exact_kernel
def _settle_ties(scores_1: Any, scores_2: Any, row: int, largest_2: Any, best: Any, best_ids: Any) -> None:
    """Pairs outside the candidates equal the K-th score: of all that do, those of lowest ids come in."""
    threshold, num_sub_keys, k = best[-1], scores_1.shape[1], len(best)
    place = 0
    while place < k and best[place] > threshold:
        place += 1
    for i in range(num_sub_keys):
        if scores_1[row, i] + largest_2 >= threshold:
            for j in range(num_sub_keys):
                if scores_1[row, i] + scores_2[row, j] == threshold:
                    best[place], best_ids[place] = threshold, i * num_sub_keys + j
                    place += 1
                    if place == k:
                        return


@kernel
def _backward(
    grad_scores: Any, ids: Any, query: Any, keys: Any, grad_query: Any, grad_keys: Any, start: int, stop: int
) -> None:
    """The parts start..stop of the tokens; each sums the gradient of the sub-keys in its own copy."""
    num_tokens, num_heads, k = ids.shape
    num_sub_keys, half_dim = keys.shape[2:]
    num_parts = len(grad_keys)
    for part in range(start, stop):
        grad_keys[part] = 0
        for m in range(part * num_tokens // num_parts, (part + 1) * num_tokens // num_parts):
            for head in range(num_heads):
                table = head if len(keys) > 1 else 0
                grad_query[m, head] = 0
                for rank in range(k):
                    grad = grad_scores[m, head, rank]
                    i, j = ids[m, head, rank] // num_sub_keys, ids[m, head, rank] % num_sub_keys
                    for d in range(half_dim):
                        grad_query[m, head, d] += grad * keys[table, 0, i, d]
                        grad_keys[part, table, 0, i, d] += grad * query[m, head, d]
                    for d in range(half_dim):
                        grad_query[m, head, half_dim + d] += grad * keys[table, 1, j, d]
                        grad_keys[part, table, 1, j, d] += grad * query[m, head, half_dim + d]
