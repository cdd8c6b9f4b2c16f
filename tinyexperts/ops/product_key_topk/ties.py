"""The exact order in rows where equal scores, NaN or infinities decide, one score after the other; see portable.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyexperts.ops.cpu.compile import exact_kernel


@exact_kernel
def top_k_of_sums_with_ties(
    scores: Any,
    num_sub_keys: int,
    num_places: int,
    candidates: Any,
    frontier: Any,
    rows: Any,
    first_out: int,
    out_stride: int,
    out_scores: Any,
    out_ids: Any,
    start: int,
    stop: int,
) -> None:
    """Find the top k of the listed rows start..stop of the scores [2, C, S], padded from num_sub_keys on."""
    scores_1, scores_2 = scores[0], scores[1]
    dtype = scores_1.dtype
    best_1, index_1 = np.empty(num_places, dtype=dtype), np.empty(num_places, dtype=np.int64)
    best_2, index_2 = np.empty(num_places, dtype=dtype), np.empty(num_places, dtype=np.int64)
    for number in range(start, stop):
        row = rows[number]
        out = first_out + row * out_stride
        top, top_ids = out_scores[out], out_ids[out]
        num_kept_1 = num_kept_2 = num_kept = 0
        for position in range(num_sub_keys):
            num_kept_1 = _insert(scores_1[row, position], position, num_kept_1, best_1, index_1)
            num_kept_2 = _insert(scores_2[row, position], position, num_kept_2, best_2, index_2)
        for c in range(len(candidates)):
            i, j = candidates[c, 0], candidates[c, 1]
            id_ = index_1[i] * num_sub_keys + index_2[j]
            num_kept = _insert(best_1[i] + best_2[j], id_, num_kept, top, top_ids)
        has_nan = top[0] != top[0]  # NaN is above all and equals nothing: what the candidates gave stays
        for f in range(0 if has_nan else len(frontier)):
            if best_1[frontier[f, 0]] + best_2[frontier[f, 1]] == top[-1]:
                _settle_ties(scores_1, scores_2, row, num_sub_keys, best_2[0], top, top_ids)
                break


@exact_kernel
def _insert(value: Any, id_: int, num_kept: int, best: Any, best_ids: Any) -> int:
    """Insert into the best so far, NaN above all as torch sorts it; return how many there are now."""
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
def _settle_ties(
    scores_1: Any, scores_2: Any, row: int, num_sub_keys: int, largest_2: Any, best: Any, best_ids: Any
) -> None:
    """Fill the places behind the pairs above the K-th score with the pairs that equal it, lowest ids first."""
    threshold, k = best[-1], len(best)
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
