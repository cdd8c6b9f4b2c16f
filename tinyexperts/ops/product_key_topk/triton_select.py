"""Triton's kernel that finds the best of a row of S scores: exactly, equal ones by the lower index, for any row.

A program of one warp a row. The maxima of 64 groups of the row give a threshold that enough elements reach; some 20 of
1,024 do. They are put side by side in memory and sorted. Where more than fit are above the threshold (equal scores, or
large ones in neighbouring places), the threshold is found by bisection of the scores' bits, and among equal scores of
the index: then exactly as many are left as are wanted.

A thread holds `FOURS` times four neighbouring scores at a time: [FOURS, 32, 4].
"""

from __future__ import annotations

import triton
import triton.language as tl

from tinyexperts.ops.product_key_topk.triton_keys import NO_KEY, index_of, key_of, ordered, score_of


@triton.jit
def select(
    scores_ptr: tl.tensor,
    best_ptr: tl.tensor,
    index_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    S: tl.tensor,
    IN_FOURS: tl.constexpr,
    NUM_BEST: tl.constexpr,
    FOURS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """Write the best of each row of scores, best first. Launched with a program of one warp for each row.

    Args:
        scores_ptr (fp32, [rows, S]): the scores.
        best_ptr (fp32, [rows, NUM_BEST]): gets the best scores.
        index_ptr (int32, [rows, NUM_BEST]): gets their indices.
        slots_ptr (int32, [rows, SLOTS]): memory for the work.
        S (int): scores of a row.
        IN_FOURS (bool): True if S is a multiple of four.
        NUM_BEST (int): scores that are wanted, at most S and 64.
        FOURS (int): a power of two.
        SLOTS (int): elements that may reach the threshold, a power of two, at least 32 and NUM_BEST.
    """
    row = tl.program_id(0).to(tl.int64)
    if IN_FOURS:
        S = S // 4 * 4  # tells the compiler that four neighbours can be loaded at once
    row_ptr = scores_ptr + row * S
    slots_ptr += row * SLOTS
    threshold = _threshold(row_ptr, S, NUM_BEST, FOURS)
    count = _put_fours_that_reach(row_ptr, threshold, slots_ptr, S, FOURS, SLOTS)
    if count <= SLOTS:
        count = _put_elements_that_reach(row_ptr, threshold, count, slots_ptr, S, SLOTS)
    if count > SLOTS:
        count = _put_by_bisection(row_ptr, slots_ptr, S, NUM_BEST, FOURS, SLOTS)
    tl.debug_barrier()
    slot = tl.arange(0, SLOTS)
    index = tl.load(slots_ptr + slot, mask=slot < count, other=0)
    score = tl.load(row_ptr + index, mask=slot < count, other=0.0)
    keys = tl.sort(tl.where(slot < count, key_of(score, index), NO_KEY), descending=True)
    tl.store(best_ptr + row * NUM_BEST + slot, score_of(keys), mask=slot < NUM_BEST)
    tl.store(index_ptr + row * NUM_BEST + slot, index_of(keys), mask=slot < NUM_BEST)


@triton.jit
def _threshold(row_ptr: tl.tensor, S: tl.tensor, NUM_BEST: tl.constexpr, FOURS: tl.constexpr) -> tl.tensor:
    """Return a number that NUM_BEST scores reach: the NUM_BEST-th largest maximum of 64 groups of the row.

    NaN counts as infinity. Groups without scores have the maximum -inf, which all reach.
    """
    maxima = tl.full([2, 32], float("-inf"), tl.float32)
    for start in range(0, S, 128 * FOURS):
        score, _, _ = _part_of_row(row_ptr, start, S, FOURS)
        number = tl.where(score == score, score, float("inf"))
        # Groups are pieces of what a thread holds, so that no threads have to meet here.
        if FOURS > 1:
            pieces = tl.max(tl.max(tl.reshape(number, (2, FOURS // 2, 32, 4)), 3), 1)
        else:
            pieces = tl.max(tl.reshape(tl.permute(tl.reshape(number, (32, 2, 2)), (1, 0, 2)), (2, 32, 2)), 2)
        maxima = tl.maximum(maxima, pieces)
    in_order = tl.sort(tl.reshape(maxima, (64,)), descending=True)
    return tl.max(tl.where(tl.arange(0, 64) == NUM_BEST - 1, in_order, float("-inf")), 0)


@triton.jit
def _put_fours_that_reach(
    row_ptr: tl.tensor,
    threshold: tl.tensor,
    slots_ptr: tl.tensor,
    S: tl.tensor,
    FOURS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """Write the first index of each four of neighbours that reaches the threshold; return how many there are.

    If they are more than SLOTS, those beyond are left out.
    """
    count = 0
    for start in range(0, S, 128 * FOURS):
        score, _, valid = _part_of_row(row_ptr, start, S, FOURS)
        number = tl.where((score == score) | (valid == 0), score, float("inf"))
        first = _first_of_fours(start, FOURS)
        chosen = (tl.max(number, 2) >= threshold) & (first < S)
        place, by_lane = _places(chosen.to(tl.int32), count)
        tl.store(slots_ptr + place, first, mask=chosen & (place < SLOTS))
        count += tl.sum(by_lane, 0)
    return count


@triton.jit
def _put_elements_that_reach(
    row_ptr: tl.tensor, threshold: tl.tensor, count: tl.tensor, slots_ptr: tl.tensor, S: tl.tensor, SLOTS: tl.constexpr
) -> tl.tensor:
    """Write the indices of the elements of the fours that reach the threshold; return how many there are."""
    tl.debug_barrier()  # other threads have stored what is loaded here
    slot = tl.arange(0, SLOTS)
    first = tl.load(slots_ptr + slot, mask=slot < count, other=S)
    index = first[:, None] + tl.arange(0, 4)[None, :]
    score = tl.load(row_ptr + index, mask=index < S, other=float("-inf"))
    reaches = ((score >= threshold) | (score != score)) & (index < S)
    tl.debug_barrier()  # and load what is stored here
    reaches = tl.reshape(reaches, (SLOTS // 32, 32, 4))
    return _put(reaches, tl.reshape(first, (SLOTS // 32, 32)), 0, slots_ptr, SLOTS)


@triton.jit
def _put_by_bisection(
    row_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    S: tl.tensor,
    NUM_BEST: tl.constexpr,
    FOURS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """Write the indices of the NUM_BEST best; return how many there are."""
    low = tl.full([], -0x80000000, tl.int64)
    high = tl.full([], 0x7FFFFFFF, tl.int64)
    while low < high:  # the largest number that NUM_BEST scores reach
        middle = low + ((high - low + 1) >> 1)
        if _number_reaching(row_ptr, middle, S, S, FOURS) >= NUM_BEST:
            low = middle
        else:
            high = middle - 1
    above = _number_reaching(row_ptr, low + 1, S, S, FOURS)
    first = 0
    last = S - 1
    while first < last:  # the lowest index up to which enough scores equal it
        middle = (first + last) >> 1
        reaching = _number_reaching(row_ptr, low, middle, S, FOURS)
        if reaching - _number_reaching(row_ptr, low + 1, middle, S, FOURS) >= NUM_BEST - above:
            last = middle
        else:
            first = middle + 1
    tl.debug_barrier()  # slots that other threads have stored and loaded are stored again
    count = 0
    for start in range(0, S, 128 * FOURS):
        score, index, valid = _part_of_row(row_ptr, start, S, FOURS)
        order = ordered(score)
        chosen = ((order > low) | ((order == low) & (index <= first))) & valid
        count = _put(chosen, _first_of_fours(start, FOURS), count, slots_ptr, SLOTS)
    return count


@triton.jit
def _part_of_row(row_ptr: tl.tensor, start: tl.tensor, S: tl.tensor, FOURS: tl.constexpr) -> tl.tensor:
    """Return scores, their indices, and which of them are inside of the row, [FOURS, 32, 4]."""
    index = _first_of_fours(start, FOURS)[:, :, None] + tl.arange(0, 4)[None, None, :]
    return tl.load(row_ptr + index, mask=index < S, other=float("-inf")), index, index < S


@triton.jit
def _first_of_fours(start: tl.tensor, FOURS: tl.constexpr) -> tl.tensor:
    return start + tl.arange(0, FOURS)[:, None] * 128 + tl.arange(0, 32)[None, :] * 4


@triton.jit
def _number_reaching(
    row_ptr: tl.tensor, least: tl.tensor, last: tl.tensor, S: tl.tensor, FOURS: tl.constexpr
) -> tl.tensor:
    """Return how many scores, as ordered numbers, are at least `least`, up to the index `last`."""
    by_lane = tl.zeros([32], tl.int32)
    for start in range(0, S, 128 * FOURS):
        score, index, valid = _part_of_row(row_ptr, start, S, FOURS)
        reaches = (ordered(score) >= least) & (index <= last) & valid
        by_lane += tl.sum(tl.sum(reaches.to(tl.int32), 2), 0)
    return tl.sum(by_lane, 0)


@triton.jit
def _places(counts: tl.tensor, first_place: tl.tensor) -> tl.tensor:
    """Return the places [.., 32] from which on each thread's elements go, and how many elements each lane has."""
    by_lane = tl.sum(counts, 0)
    before_lane = tl.cumsum(by_lane, 0) - by_lane
    return first_place + before_lane[None, :] + tl.cumsum(counts, 0) - counts, by_lane


@triton.jit
def _put(chosen: tl.tensor, first: tl.tensor, place: tl.tensor, slots_ptr: tl.tensor, SLOTS: tl.constexpr) -> tl.tensor:
    """Write the indices of chosen elements [.., 32, 4] from `place` on; return the place behind them.

    `first` has the index of each four's first. Four planes are stored one by one, so that no layout has to change.
    """
    even, odd = tl.split(tl.reshape(chosen.to(tl.int32), (chosen.shape[0], 32, 2, 2)))
    is_0, is_2 = tl.split(even)
    is_1, is_3 = tl.split(odd)
    place_0, by_lane = _places(is_0 + is_1 + is_2 + is_3, place)
    place_1 = place_0 + is_0
    place_2 = place_1 + is_1
    place_3 = place_2 + is_2
    tl.store(slots_ptr + place_0, first, mask=(is_0 > 0) & (place_0 < SLOTS))
    tl.store(slots_ptr + place_1, first + 1, mask=(is_1 > 0) & (place_1 < SLOTS))
    tl.store(slots_ptr + place_2, first + 2, mask=(is_2 > 0) & (place_2 < SLOTS))
    tl.store(slots_ptr + place_3, first + 3, mask=(is_3 > 0) & (place_3 < SLOTS))
    return place + tl.sum(by_lane, 0)
