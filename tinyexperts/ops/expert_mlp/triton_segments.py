"""Triton's kernels that sum by expert: the gradient of a table, its squared norm, and Adam straight from it.

The pairs of a token and an expert are sorted stably by expert. A program walks over a tile of sorted pairs, and sums
factor * token; where the expert changes, its row is done. A row that a tile's edge cuts goes in parts to a buffer of
two parts a tile, and a second launch adds its parts in the order of the tiles. So the grid and the buffer depend on
the number of pairs alone and nothing waits for the device, no expert is too popular for one program, there are no
atomics, and the bits depend on the inputs and the size of the tiles alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tinyexperts.ops.row_adam.triton_update import update_vector

# What happens to the sums of a row: written to the row of the table, or to the place of the row among the touched ones,
# used for a step of Adam, or squared and added to the tile's sum of squares.
DENSE, ROWS, ADAM, NORM = 0, 1, 2, 3


@triton.jit
def _squares(sums: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.sum(tl.where(inside, sums * sums, 0.0), 0)


@triton.jit
def _finish(
    out_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    row: tl.tensor,
    sum_u: tl.tensor,
    sum_w: tl.tensor,
    sum_v: tl.tensor,
    d: tl.tensor,
    inside: tl.tensor,
    gain_1: tl.tensor,
    gain_2: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    keep: tl.tensor,
    key: tl.tensor,
    E: tl.constexpr,
    D: tl.constexpr,
    MODE: tl.constexpr,
    ONE_A_VECTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> tl.tensor:
    """Use the sums of a row; return those of their squares for NORM."""
    element = row * (E * D) + d
    squares = 0.0
    if MODE == 3:
        squares = _squares(sum_v, inside)
        if E > 1:
            squares += _squares(sum_u, inside)
        if E == 3:
            squares += _squares(sum_w, inside)
    elif MODE == 2:
        if E > 1:
            update_vector(
                *(out_ptr, first_ptr, second_ptr, element, row * E, sum_u, inside),
                *(gain_1, gain_2, rate, eps, keep, key, D, ONE_A_VECTOR, STOCHASTIC),
            )
        if E == 3:
            update_vector(
                *(out_ptr, first_ptr, second_ptr, element + D, row * E + 1, sum_w, inside),
                *(gain_1, gain_2, rate, eps, keep, key, D, ONE_A_VECTOR, STOCHASTIC),
            )
        update_vector(
            *(out_ptr, first_ptr, second_ptr, element + (E - 1) * D, row * E + (E - 1), sum_v, inside),
            *(gain_1, gain_2, rate, eps, keep, key, D, ONE_A_VECTOR, STOCHASTIC),
        )
    else:
        if E > 1:
            tl.store(out_ptr + element, sum_u.to(out_ptr.dtype.element_ty), mask=inside)
        if E == 3:
            tl.store(out_ptr + element + D, sum_w.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + element + (E - 1) * D, sum_v.to(out_ptr.dtype.element_ty), mask=inside)
    return squares


@triton.jit(do_not_specialize=["num_pairs", "num_retrieved", "key"])
def sum_tiles(
    sorted_ids_ptr: tl.tensor,
    order_ptr: tl.tensor,
    places_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    x_ptr: tl.tensor,
    grad_y_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    num_pairs: tl.tensor,
    num_retrieved: tl.tensor,
    gain_1: tl.tensor,
    gain_2: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    keep: tl.tensor,
    key: tl.tensor,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MODE: tl.constexpr,
    ONE_A_VECTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Sum the rows that lie inside of a tile, and the parts [tiles, 2, E, D] (fp32) of those that its edges cut."""
    tile = tl.program_id(0).to(tl.int64)
    start = tile * TILE
    end = tl.minimum(start + TILE, num_pairs)
    # Four elements a lane at most: of bf16 tokens eight would fill 16 bytes, but then they and the fp32 sums would lie
    # in different lanes.
    d = tl.max_contiguous(tl.arange(0, BLOCK), 4)
    inside = d < D
    sum_u = tl.zeros([BLOCK], tl.float32)
    sum_w = tl.zeros([BLOCK], tl.float32)
    sum_v = tl.zeros([BLOCK], tl.float32)
    squares = 0.0
    expert = tl.load(sorted_ids_ptr + start)
    began_before = tl.load(sorted_ids_ptr + start - 1, mask=start > 0, other=-1) == expert
    for position in range(start, end):
        pair = tl.load(order_ptr + position)
        next_expert = tl.load(sorted_ids_ptr + position + 1, mask=position + 1 < num_pairs, other=-1)
        # In 32 bits, which all pairs fit: a division of 64 bits is a function of its own on a GPU.
        token = (pair.to(tl.int32) // num_retrieved).to(tl.int64)
        factor_v = tl.load(factors_ptr + (E - 1) * num_pairs + pair)
        sum_v += factor_v * tl.load(grad_y_ptr + token * D + d, mask=inside, other=0.0).to(tl.float32)
        if E > 1:
            x = tl.load(x_ptr + token * D + d, mask=inside, other=0.0).to(tl.float32)
            sum_u += tl.load(factors_ptr + pair) * x
        if E == 3:
            sum_w += tl.load(factors_ptr + num_pairs + pair) * x
        if (next_expert != expert) | (position + 1 == end):
            goes_on = next_expert == expert
            if began_before | goes_on:
                part = parts_ptr + (tile * 2 + tl.where(began_before, 0, 1)) * (E * D) + d
                if E > 1:
                    tl.store(part, sum_u, mask=inside)
                if E == 3:
                    tl.store(part + D, sum_w, mask=inside)
                tl.store(part + (E - 1) * D, sum_v, mask=inside)
            else:
                row = expert.to(tl.int64)
                if MODE == 1:
                    row = tl.load(places_ptr + position).to(tl.int64)
                squares += _finish(
                    *(out_ptr, first_ptr, second_ptr, row, sum_u, sum_w, sum_v, d, inside),
                    *(gain_1, gain_2, rate, eps, keep, key, E, D, MODE, ONE_A_VECTOR, STOCHASTIC),
                )
            sum_u = tl.zeros([BLOCK], tl.float32)
            sum_w = tl.zeros([BLOCK], tl.float32)
            sum_v = tl.zeros([BLOCK], tl.float32)
            expert = next_expert
            began_before = False
    if MODE == 3:
        tl.store(out_ptr + 2 * tile, squares)


@triton.jit(do_not_specialize=["num_pairs", "key"])
def add_parts(
    sorted_ids_ptr: tl.tensor,
    places_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    num_pairs: tl.tensor,
    gain_1: tl.tensor,
    gain_2: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    keep: tl.tensor,
    key: tl.tensor,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MODE: tl.constexpr,
    ONE_A_VECTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Add the parts of the row that begins in a tile and goes on behind it, tile by tile."""
    tile = tl.program_id(0).to(tl.int64)
    start = tile * TILE
    end = tl.minimum(start + TILE, num_pairs)
    expert = tl.load(sorted_ids_ptr + end - 1)
    goes_on = tl.load(sorted_ids_ptr + end, mask=end < num_pairs, other=-1) == expert
    began_before = tl.load(sorted_ids_ptr + start - 1, mask=start > 0, other=-1) == expert
    squares = 0.0
    if goes_on & (began_before == 0):
        d = tl.max_contiguous(tl.arange(0, BLOCK), 4)
        inside = d < D
        part = parts_ptr + (tile * 2 + 1) * (E * D) + d
        sum_u = tl.load(part, mask=inside, other=0.0)
        sum_w = sum_u
        if E == 3:
            sum_w = tl.load(part + D, mask=inside, other=0.0)
        sum_v = tl.load(part + (E - 1) * D, mask=inside, other=0.0)
        other = tile
        more = goes_on
        while more:
            other += 1
            part = parts_ptr + other * 2 * (E * D) + d
            if E > 1:
                sum_u += tl.load(part, mask=inside, other=0.0)
            if E == 3:
                sum_w += tl.load(part + D, mask=inside, other=0.0)
            sum_v += tl.load(part + (E - 1) * D, mask=inside, other=0.0)
            behind = (other + 1) * TILE
            more = tl.load(sorted_ids_ptr + behind, mask=behind < num_pairs, other=-1) == expert
        row = expert.to(tl.int64)
        if MODE == 1:
            row = tl.load(places_ptr + end - 1).to(tl.int64)
        squares += _finish(
            *(out_ptr, first_ptr, second_ptr, row, sum_u, sum_w, sum_v, d, inside),
            *(gain_1, gain_2, rate, eps, keep, key, E, D, MODE, ONE_A_VECTOR, STOCHASTIC),
        )
    if MODE == 3:
        tl.store(out_ptr + 2 * tile + 1, squares)
