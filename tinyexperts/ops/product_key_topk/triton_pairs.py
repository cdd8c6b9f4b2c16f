"""Triton's kernel that finds the top k of the sums of two rows of scores, from the best of each row; see portable.py.

A program of one warp a query. Each candidate pair of places takes the place that the number of better candidates says.
Where a pair outside of the candidates equals the K-th sum, the rows' scores are read again, and the equal pairs fill
the places behind the better ones in the order of their ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tinyexperts.ops.product_key_topk.triton_keys import NO_KEY, index_of, key_of, score_of


# Outputs may be parts of larger tensors: their addresses must not decide which code is compiled.
@triton.jit(do_not_specialize_on_alignment=["out_scores_ptr", "out_ids_ptr"])
def pairs(
    scores_ptr: tl.tensor,
    best_ptr: tl.tensor,
    index_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    frontier_ptr: tl.tensor,
    out_scores_ptr: tl.tensor,
    out_ids_ptr: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    NUM_BEST: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
    NUM_FRONTIER: tl.constexpr,
    CANDIDATES: tl.constexpr,
    COMPARED: tl.constexpr,
    FRONTIER: tl.constexpr,
    S_BLOCK: tl.constexpr,
) -> None:
    """Write the top k of the sums of each query. Launched with a program of one warp for each query.

    Args:
        scores_ptr (fp32, [2, queries, S]): the scores of both halves.
        best_ptr (fp32, [2, queries, NUM_BEST]): the best of them, best first.
        index_ptr (int32, [2, queries, NUM_BEST]): their indices.
        candidates_ptr (int32, [NUM_CANDIDATES, 2]): the pairs of places that can be above the K-th sum.
        frontier_ptr (int32, [NUM_FRONTIER, 2]): the best pairs of places that are not among them.
        out_scores_ptr (fp32, [queries, K]): gets the top sums.
        out_ids_ptr (int64, [queries, K]): gets their ids i*S + j.
        S (int): scores of a row; its square is less than 2^31.
        K (int): sums that are wanted.
        NUM_BEST (int): min(K + 1, S).
        NUM_CANDIDATES (int): candidates.
        NUM_FRONTIER (int): pairs of the frontier, 0 or more.
        CANDIDATES (int): NUM_CANDIDATES rounded up to a power of two.
        COMPARED (int): candidates that all others are compared with at a time; it divides CANDIDATES.
        FRONTIER (int): NUM_FRONTIER rounded up to a power of two.
        S_BLOCK (int): scores that are looked at together for equal sums, a power of two.
    """
    query = tl.program_id(0).to(tl.int64)
    second_half = tl.num_programs(0).to(tl.int64)
    scores_1_ptr = scores_ptr + query * S
    scores_2_ptr = scores_1_ptr + second_half * S
    best_1_ptr = best_ptr + query * NUM_BEST
    best_2_ptr = best_1_ptr + second_half * NUM_BEST
    index_1_ptr = index_ptr + query * NUM_BEST
    index_2_ptr = index_1_ptr + second_half * NUM_BEST
    out_scores_ptr += query * K
    out_ids_ptr += query * K

    keys = _keys(0, best_1_ptr, best_2_ptr, index_1_ptr, index_2_ptr, candidates_ptr, S, NUM_CANDIDATES, CANDIDATES)
    place = tl.zeros([CANDIDATES], tl.int32)
    for start in tl.range(0, CANDIDATES, COMPARED):  # all at once would not fit into registers
        others = _keys(
            start, best_1_ptr, best_2_ptr, index_1_ptr, index_2_ptr, candidates_ptr, S, NUM_CANDIDATES, COMPARED
        )
        place += tl.sum((others[:, None] > keys[None, :]).to(tl.int32), 0)
    there = keys != NO_KEY
    chosen = there & (place < K)
    score = score_of(keys)
    tl.store(out_scores_ptr + place, score, mask=chosen)
    tl.store(out_ids_ptr + place, index_of(keys).to(tl.int64), mask=chosen)

    # NaN sorts above all and equals nothing: such queries keep what the candidates gave.
    has_nan = tl.sum((there & (score != score)).to(tl.int32), 0) > 0
    is_last = chosen & (place == K - 1) & (score == score)
    last = tl.max(tl.where(is_last, score, float("-inf")), 0)
    if _frontier_has(last, best_1_ptr, best_2_ptr, frontier_ptr, NUM_FRONTIER, FRONTIER) & (has_nan == 0):
        num_above = tl.sum((there & (score > last)).to(tl.int32), 0)
        largest_2 = tl.load(best_2_ptr)
        tl.debug_barrier()  # places that other threads have stored to are stored to again
        _settle_ties(last, num_above, largest_2, scores_1_ptr, scores_2_ptr, out_scores_ptr, out_ids_ptr, S, K, S_BLOCK)


@triton.jit
def _keys(
    start: tl.tensor,
    best_1_ptr: tl.tensor,
    best_2_ptr: tl.tensor,
    index_1_ptr: tl.tensor,
    index_2_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    S: tl.tensor,
    NUM_CANDIDATES: tl.constexpr,
    NUM: tl.constexpr,
) -> tl.tensor:
    """Return the keys of NUM candidates, their sums and ids; NO_KEY where there are no more."""
    candidate = start + tl.arange(0, NUM)
    there = candidate < NUM_CANDIDATES
    i = tl.load(candidates_ptr + 2 * candidate, mask=there, other=0)
    j = tl.load(candidates_ptr + 2 * candidate + 1, mask=there, other=0)
    score = tl.load(best_1_ptr + i) + tl.load(best_2_ptr + j)
    id_ = tl.load(index_1_ptr + i) * S + tl.load(index_2_ptr + j)
    return tl.where(there, key_of(score, id_), NO_KEY)


@triton.jit
def _frontier_has(
    last: tl.tensor,
    best_1_ptr: tl.tensor,
    best_2_ptr: tl.tensor,
    frontier_ptr: tl.tensor,
    NUM_FRONTIER: tl.constexpr,
    FRONTIER: tl.constexpr,
) -> tl.tensor:
    """Return True if a pair of the frontier has the sum `last`."""
    number = tl.arange(0, FRONTIER)
    there = number < NUM_FRONTIER
    i = tl.load(frontier_ptr + 2 * number, mask=there, other=0)
    j = tl.load(frontier_ptr + 2 * number + 1, mask=there, other=0)
    sums = tl.load(best_1_ptr + i) + tl.load(best_2_ptr + j)
    return tl.sum((there & (sums == last)).to(tl.int32), 0) > 0


@triton.jit
def _settle_ties(
    last: tl.tensor,
    place: tl.tensor,
    largest_2: tl.tensor,
    scores_1_ptr: tl.tensor,
    scores_2_ptr: tl.tensor,
    out_scores_ptr: tl.tensor,
    out_ids_ptr: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    S_BLOCK: tl.constexpr,
) -> None:
    """Fill the places from `place` on with the pairs whose sum is `last`, lowest ids first."""
    second = tl.arange(0, S_BLOCK)
    i = 0
    while (i < S) & (place < K):
        score_1 = tl.load(scores_1_ptr + i)
        if score_1 + largest_2 >= last:
            for start in range(0, S, S_BLOCK):
                j = start + second
                total = score_1 + tl.load(scores_2_ptr + j, mask=j < S, other=float("nan"))
                equal = (total == last).to(tl.int32)
                at = place + tl.cumsum(equal, 0) - equal
                tl.store(out_scores_ptr + at, total, mask=(equal > 0) & (at < K))
                tl.store(out_ids_ptr + at, (i * S + j).to(tl.int64), mask=(equal > 0) & (at < K))
                place += tl.sum(equal, 0)
        i += 1
