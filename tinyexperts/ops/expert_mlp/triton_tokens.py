"""Triton's kernels that visit the experts of a token: the forward pass, and the backward pass up to the factors.

One program has one token, whose x (or grad_y) stays in registers. It loads the vectors of a few experts at a time, each
once. Sums are in fp32, in a fixed order.

A table in 4 bits (int4.py) stores two numbers in a byte. A program then holds its columns in two halves, those of the
low and those of the high bits, each with the columns of x and y that belong to them. Other tables have the first half
only.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATION_CODES = {None: 0, "gelu": 1, "relu": 2, "relu2": 3, "silu": 4}


@triton.jit
def activate(h: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Return act(h)."""
    if ACTIVATION == 1:
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == 4:
        return h / (1.0 + tl.exp(-h))
    else:
        positive = tl.where(h < 0, 0.0, h)  # NaN stays
        return positive * positive if ACTIVATION == 3 else positive


@triton.jit
def derivative(h: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Return act'(h)."""
    if ACTIVATION == 1:
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == 2:
        return tl.where(h > 0, 1.0, 0.0)
    elif ACTIVATION == 3:
        return 2.0 * tl.where(h < 0, 0.0, h)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-h))
        return sigmoid * (1.0 + h * (1.0 - sigmoid))


@triton.jit
def columns_of(stored: tl.tensor, D: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Return the columns of the numbers that are stored at a place, and whether they exist: of both halves."""
    if BITS == 4:
        group = stored // 16
        size = tl.minimum(D - 32 * group, 32)
        low = 32 * group + stored % 16
        high = low + (size + 1) // 2
        return low, stored < (D + 1) // 2, high, (stored % 16 < size // 2) & (high < D)
    else:
        return stored, stored < D, stored, stored < D


@triton.jit
def vectors_of(
    table_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    vectors: tl.tensor,
    live: tl.tensor,
    stored: tl.tensor,
    D: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Return the numbers of some vectors of the table, [ROWS, BLOCK] of both halves; without the scales of int8."""
    WIDTH: tl.constexpr = (D + 1) // 2 if BITS == 4 else D
    mask = live[:, None] & (stored < WIDTH)[None, :]
    NOTHING: tl.constexpr = 0.0 if BITS >= 16 else 0
    numbers = tl.load(table_ptr + vectors[:, None] * WIDTH + stored[None, :], mask=mask, other=NOTHING)
    if BITS == 4:
        NUM_GROUPS: tl.constexpr = (D + 31) // 32
        groups = scales_ptr + vectors[:, None] * NUM_GROUPS + (stored // 16)[None, :]
        scales = tl.load(groups, mask=mask, other=0.0).to(tl.float32)
        low = ((numbers & 15).to(tl.float32) - 8.0) * scales
        high = ((numbers >> 4).to(tl.float32) - 8.0) * scales
        return low, high
    else:
        wide = numbers.to(tl.float32)
        return wide, wide


@triton.jit
def scaled(
    products: tl.tensor, scales_ptr: tl.tensor, vectors: tl.tensor, live: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """Return products times the scale that int8 has for each vector."""
    if BITS == 8:
        return products * tl.load(scales_ptr + vectors, mask=live, other=0.0).to(tl.float32)
    else:
        return products


@triton.jit
def products_of(
    first: tl.tensor, second: tl.tensor, operand_1: tl.tensor, operand_2: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """Return the products [ROWS] of vectors with a token, both in halves."""
    if BITS == 4:
        return tl.sum(first * operand_1[None, :] + second * operand_2[None, :], 1)
    else:
        return tl.sum(first * operand_1[None, :], 1)


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def forward(
    x_ptr: tl.tensor,
    table_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    y_ptr: tl.tensor,
    pre_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    P: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Write y [SPLITS, M, D], its sum over some of a token's experts, and the pre-activations [E - 1, M, P] (fp32)."""
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    plane = num_tokens.to(tl.int64)
    stored = tl.arange(0, BLOCK)
    column_1, inside_1, column_2, inside_2 = columns_of(stored, D, BITS)
    x_1 = tl.zeros([BLOCK], tl.float32)
    x_2 = x_1
    if E > 1:
        x_1 = tl.load(x_ptr + token * D + column_1, mask=inside_1, other=0.0).to(tl.float32)
        if BITS == 4:
            x_2 = tl.load(x_ptr + token * D + column_2, mask=inside_2, other=0.0).to(tl.float32)
    y_1 = tl.zeros([BLOCK], tl.float32)
    y_2 = y_1
    PER_SPLIT: tl.constexpr = tl.cdiv(tl.cdiv(P, SPLITS), ROWS) * ROWS
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, P)
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        live = place < last
        pair = token * P + place
        ids = tl.load(ids_ptr + pair, mask=live, other=0)
        tl.device_assert((ids >= 0) & (ids < num_experts), "ids must be between 0 and N - 1", mask=live)
        coefficient = tl.load(weights_ptr + pair, mask=live, other=0.0).to(tl.float32)
        vector = ids * E
        # All vectors of an expert at once: what waits for the memory then waits together.
        v_1, v_2 = vectors_of(table_ptr, scales_ptr, vector + (E - 1), live, stored, D, BITS)
        if E > 1:
            u_1, u_2 = vectors_of(table_ptr, scales_ptr, vector, live, stored, D, BITS)
        if E == 3:
            w_1, w_2 = vectors_of(table_ptr, scales_ptr, vector + 1, live, stored, D, BITS)
        if E > 1:
            h = scaled(products_of(u_1, u_2, x_1, x_2, BITS), scales_ptr, vector, live, BITS)
            tl.store(pre_ptr + pair, h, mask=live)
            coefficient *= activate(h, ACTIVATION)
        if E == 3:
            g = scaled(products_of(w_1, w_2, x_1, x_2, BITS), scales_ptr, vector + 1, live, BITS)
            tl.store(pre_ptr + plane * P + pair, g, mask=live)
            coefficient *= g
        coefficient = scaled(coefficient, scales_ptr, vector + (E - 1), live, BITS)
        coefficient = tl.where(live, coefficient, 0.0)  # an infinite x makes NaN of rows that are not there
        y_1 += tl.sum(v_1 * coefficient[:, None], 0)
        if BITS == 4:
            y_2 += tl.sum(v_2 * coefficient[:, None], 0)
    out = y_ptr + (split * plane + token) * D
    tl.store(out + column_1, y_1.to(y_ptr.dtype.element_ty), mask=inside_1)
    if BITS == 4:
        tl.store(out + column_2, y_2.to(y_ptr.dtype.element_ty), mask=inside_2)


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def backward(
    grad_y_ptr: tl.tensor,
    table_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    pre_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_weights_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    P: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Write grad_x [M, D], grad_weights [M, P], and the factors [E, M, P] (fp32) of the table's gradient."""
    token = tl.program_id(0).to(tl.int64)
    plane = num_tokens.to(tl.int64) * P
    stored = tl.arange(0, BLOCK)
    column_1, inside_1, column_2, inside_2 = columns_of(stored, D, BITS)
    grad_1 = tl.load(grad_y_ptr + token * D + column_1, mask=inside_1, other=0.0).to(tl.float32)
    grad_2 = grad_1
    if BITS == 4:
        grad_2 = tl.load(grad_y_ptr + token * D + column_2, mask=inside_2, other=0.0).to(tl.float32)
    x_1 = tl.zeros([BLOCK], tl.float32)
    x_2 = x_1
    for start in range(0, P, ROWS):
        place = start + tl.arange(0, ROWS)
        live = place < P
        pair = token * P + place
        ids = tl.load(ids_ptr + pair, mask=live, other=0)
        tl.device_assert((ids >= 0) & (ids < num_experts), "ids must be between 0 and N - 1", mask=live)
        weight = tl.load(weights_ptr + pair, mask=live, other=0.0).to(tl.float32)
        vector = ids * E
        # All vectors of an expert at once: what waits for the memory then waits together.
        v_1, v_2 = vectors_of(table_ptr, scales_ptr, vector + (E - 1), live, stored, D, BITS)
        if E > 1:
            u_1, u_2 = vectors_of(table_ptr, scales_ptr, vector, live, stored, D, BITS)
        if E == 3:
            w_1, w_2 = vectors_of(table_ptr, scales_ptr, vector + 1, live, stored, D, BITS)
        slope = products_of(v_1, v_2, grad_1, grad_2, BITS)  # of y by the coefficient of v
        slope = scaled(slope, scales_ptr, vector + (E - 1), live, BITS)
        if E == 1:
            tl.store(grad_weights_ptr + pair, slope.to(grad_weights_ptr.dtype.element_ty), mask=live)
            tl.store(factors_ptr + pair, weight, mask=live)
        else:
            h = tl.load(pre_ptr + pair, mask=live, other=0.0)
            value = activate(h, ACTIVATION)
            by_h = slope * weight * derivative(h, ACTIVATION)
            if E == 3:
                g = tl.load(pre_ptr + plane + pair, mask=live, other=0.0)
                by_g = slope * weight * value
                tl.store(factors_ptr + plane + pair, by_g, mask=live)
                by_g = scaled(by_g, scales_ptr, vector + 1, live, BITS)
                by_g = tl.where(live, by_g, 0.0)
                x_1 += tl.sum(w_1 * by_g[:, None], 0)
                if BITS == 4:
                    x_2 += tl.sum(w_2 * by_g[:, None], 0)
                value *= g
                by_h *= g
            tl.store(grad_weights_ptr + pair, (slope * value).to(grad_weights_ptr.dtype.element_ty), mask=live)
            tl.store(factors_ptr + pair, by_h, mask=live)
            tl.store(factors_ptr + (E - 1) * plane + pair, weight * value, mask=live)
            by_h = scaled(by_h, scales_ptr, vector, live, BITS)
            by_h = tl.where(live, by_h, 0.0)
            x_1 += tl.sum(u_1 * by_h[:, None], 0)
            if BITS == 4:
                x_2 += tl.sum(u_2 * by_h[:, None], 0)
    out = grad_x_ptr + token * D
    tl.store(out + column_1, x_1.to(grad_x_ptr.dtype.element_ty), mask=inside_1)
    if BITS == 4:
        tl.store(out + column_2, x_2.to(grad_x_ptr.dtype.element_ty), mask=inside_2)
