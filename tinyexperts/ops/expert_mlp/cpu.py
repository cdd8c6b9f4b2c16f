"""The sum of a token's retrieved experts on the CPU; must match reference.py.

The limit is the memory: P random rows a token. So each row is read once, in groups of 4 experts: their products with
the token, then one pass that adds all four to the output. During that pass the rows of the experts 8 further on (in the
next token, too) are prefetched, a few cache lines at a time: asked for at once they would fill the queue to the memory
and hold up the arithmetic (1.6 times the time at D = 256). The backward pass is the same with other vectors; it leaves
a factor for each pair and vector, from which the gradient of each touched row is summed in the order of its tokens.

Every token and every touched row is summed by one thread in a fixed order: the bits don't depend on the number of
threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.ops import huge_pages
from tinyexperts.ops.activation import activate, activation_derivative
from tinyexperts.ops.cpu_threads import in_parts
from tinyexperts.ops.expert_mlp.reference import accumulation_dtype, coefficients
from tinyexperts.ops.numba_kernel import CACHE_LINE_BYTES, array_of, inlined, kernel, prefetch, widen

_AHEAD = 8
# Elements between two rounds of prefetching.
_CHUNK = 32
# Elements of gathered rows that are worth a part of their own.
_MIN_ELEMENTS = 1 << 16

_ACTIVATION_NUMBERS = {None: 0, "gelu": 1, "relu": 2, "relu2": 3, "silu": 4}


def expert_mlp(
    x_MD: Tensor, experts_NED: Tensor, ids_MP: Tensor, weights_MP: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """y [M, D] and the pre-activations [E - 1, M, P]."""
    num_tokens, num_retrieved = ids_MP.shape
    num_vectors = experts_NED.shape[1]
    dtype = accumulation_dtype(x_MD, experts_NED)
    y = torch.empty(x_MD.shape, dtype=dtype)
    pre_activations = torch.empty((num_vectors - 1, num_tokens, num_retrieved), dtype=dtype)
    in_parts(
        _forward,
        num_tokens,
        array_of(x_MD.to(dtype)),
        array_of(experts_NED),
        array_of(ids_MP),
        array_of(weights_MP.to(dtype)),
        _ACTIVATION_NUMBERS[activation],
        _constants(dtype),
        array_of(y),
        array_of(pre_activations),
        min_items=_min_tokens(experts_NED, num_retrieved),
    )
    return y.to(x_MD.dtype), pre_activations


def expert_mlp_backward(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    pre_activations_FMP: Tensor,
    activation: str | None,
    *,
    table_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the touched rows (ascending ids [R], values [R, E, D]) and of the weights."""
    grad_x, grad_weights, factors_EMP = backward_of_tokens(
        grad_y_MD, x_MD, experts_NED, ids_MP, weights_MP, pre_activations_FMP, activation
    )
    if table_gradient and ids_MP.numel():
        rows, order, starts = touched_rows(ids_MP)
        grad_rows = sum_touched_rows(order, starts, factors_EMP, x_MD, grad_y_MD)
    else:
        rows, grad_rows = ids_MP.new_empty(0), factors_EMP.new_empty((0, *experts_NED.shape[1:]))
    return grad_x, rows, grad_rows.to(experts_NED.dtype), grad_weights


def backward_of_tokens(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    pre_activations_FMP: Tensor,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the weights, and the factors [E, M, P] that the table's gradient is made of.

    A factor is what multiplies x (for u and w) or grad_y (for v) in the gradient of an expert: one number a pair and
    vector, in the type that is computed in.
    """
    dtype = accumulation_dtype(x_MD, experts_NED)
    grad_x = torch.empty(x_MD.shape, dtype=dtype)
    grad_weights = torch.empty(weights_MP.shape, dtype=dtype)
    factors_EMP = torch.empty((experts_NED.shape[1], *ids_MP.shape), dtype=dtype)
    coefficient, derivatives = _coefficients_and_derivatives(pre_activations_FMP, activation, weights_MP)
    in_parts(
        _backward,
        len(x_MD),
        array_of(grad_y_MD.to(dtype)),
        array_of(experts_NED),
        array_of(ids_MP),
        array_of(weights_MP.to(dtype)),
        array_of(coefficient.to(dtype)),
        array_of(derivatives.to(dtype)),
        _constants(dtype),
        array_of(grad_x),
        array_of(grad_weights),
        array_of(factors_EMP),
        min_items=_min_tokens(experts_NED, ids_MP.shape[1]),
    )
    return grad_x.to(x_MD.dtype), grad_weights.to(weights_MP.dtype), factors_EMP


def touched_rows(ids_MP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Touched ids [R], ascending; the pairs sorted stably by id [M*P]; where each row's pairs start, and their end."""
    sorted_ids, order = ids_MP.flatten().sort(stable=True)
    rows, starts = torch.empty_like(order), order.new_empty(len(order) + 1)
    num_rows = _find_starts(array_of(sorted_ids), array_of(rows), array_of(starts))
    return rows[:num_rows].clone(), order, starts[: num_rows + 1]


def sum_touched_rows(order: Tensor, starts: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor) -> Tensor:
    """The gradients of the touched rows [R, E, D], in the factors' type."""
    num_vectors, _, num_retrieved = factors_EMP.shape
    dtype = factors_EMP.dtype
    grad_rows = huge_pages.empty(len(starts) - 1, num_vectors, x_MD.shape[1], dtype=dtype)
    in_parts(
        _sum_touched_rows,
        len(grad_rows),
        array_of(order),
        array_of(starts),
        array_of(factors_EMP.flatten(1)),
        array_of(x_MD.to(dtype)),
        array_of(grad_y_MD.to(dtype)),
        num_retrieved,
        array_of(grad_rows),
        min_items=max(1, _MIN_ELEMENTS // (num_vectors * x_MD.shape[1])),
    )
    return grad_rows


def _min_tokens(experts_NED: Tensor, num_retrieved: int) -> int:
    return max(1, _MIN_ELEMENTS // max(1, num_retrieved * experts_NED.shape[1] * experts_NED.shape[2]))


def _constants(dtype: torch.dtype) -> Any:
    """0, 1/2 and sqrt(1/2) in the type that is computed in: Python's literals would widen fp32 to fp64."""
    return np.array([0.0, 0.5, math.sqrt(0.5)], dtype=np.float64 if dtype == torch.float64 else np.float32)


def _coefficients_and_derivatives(
    pre_activations_FMP: Tensor, activation: str | None, weights_MP: Tensor
) -> tuple[Tensor, Tensor]:
    """What multiplies v [M, P], and its derivatives by each product [E - 1, M, P]."""
    if activation is None:
        return torch.ones_like(weights_MP), pre_activations_FMP
    derivative = activation_derivative(pre_activations_FMP[0], activation)
    if len(pre_activations_FMP) == 1:
        return coefficients(pre_activations_FMP, activation), derivative.unsqueeze(0)
    hidden = activate(pre_activations_FMP[0], activation)
    return hidden * pre_activations_FMP[1], torch.stack([derivative * pre_activations_FMP[1], hidden])


@kernel
def _find_starts(sorted_ids: Any, rows: Any, starts: Any) -> int:
    num_rows = 0
    for pair in range(len(sorted_ids)):
        if pair == 0 or sorted_ids[pair] != sorted_ids[pair - 1]:
            rows[num_rows], starts[num_rows] = sorted_ids[pair], pair
            num_rows += 1
    starts[num_rows] = len(sorted_ids)
    return num_rows


@inlined
def _activate(h: Any, activation: int, constants: Any) -> Any:
    zero, half, root_half = constants[0], constants[1], constants[2]
    if activation == 1:
        return h * half * (half + half + math.erf(h * root_half))
    if activation == 4:
        return h / (half + half + math.exp(-h))
    positive = zero if h < zero else h  # NaN stays
    return positive * positive if activation == 3 else positive


@inlined
def _products_of_4(experts: Any, i0: int, i1: int, i2: int, i3: int, vector: int, x: Any, m: int, zero: Any) -> Any:
    """experts[i, vector] . x[m] for four experts."""
    sum0 = sum1 = sum2 = sum3 = zero
    for d in range(x.shape[1]):
        sum0 += widen(experts[i0, vector, d]) * x[m, d]
        sum1 += widen(experts[i1, vector, d]) * x[m, d]
        sum2 += widen(experts[i2, vector, d]) * x[m, d]
        sum3 += widen(experts[i3, vector, d]) * x[m, d]
    return sum0, sum1, sum2, sum3


@inlined
def _product(experts: Any, i: int, vector: int, x: Any, m: int, zero: Any) -> Any:
    total = zero
    for d in range(x.shape[1]):
        total += widen(experts[i, vector, d]) * x[m, d]
    return total


@inlined
def _add_4(
    experts: Any,
    ids: Any,
    vector: int,
    pair: int,
    num_pairs: int,
    factor0: Any,
    factor1: Any,
    factor2: Any,
    factor3: Any,
    y: Any,
    m: int,
    prefetches: bool,
) -> None:
    """y[m] += the sum of factor * experts[id, vector] over four pairs, while the rows of later pairs are prefetched."""
    i0, i1, i2, i3 = ids[pair], ids[pair + 1], ids[pair + 2], ids[pair + 3]
    bytes_an_element = experts.shape[1] * experts.itemsize
    row_bytes = experts.shape[2] * bytes_an_element
    last = num_pairs - 1
    ahead0 = experts.ctypes.data + ids[min(pair + _AHEAD, last)] * row_bytes
    ahead1 = experts.ctypes.data + ids[min(pair + _AHEAD + 1, last)] * row_bytes
    ahead2 = experts.ctypes.data + ids[min(pair + _AHEAD + 2, last)] * row_bytes
    ahead3 = experts.ctypes.data + ids[min(pair + _AHEAD + 3, last)] * row_bytes
    dim = y.shape[1]
    whole = dim // _CHUNK * _CHUNK
    for chunk in range(0, whole, _CHUNK):
        if prefetches:
            for offset in range(chunk * bytes_an_element, (chunk + _CHUNK) * bytes_an_element, CACHE_LINE_BYTES):
                prefetch(ahead0 + offset)
                prefetch(ahead1 + offset)
                prefetch(ahead2 + offset)
                prefetch(ahead3 + offset)
        for d in range(chunk, chunk + _CHUNK):
            y[m, d] += (factor0 * widen(experts[i0, vector, d]) + factor1 * widen(experts[i1, vector, d])) + (
                factor2 * widen(experts[i2, vector, d]) + factor3 * widen(experts[i3, vector, d])
            )
    if prefetches:
        for offset in range(whole * bytes_an_element, row_bytes, CACHE_LINE_BYTES):
            prefetch(ahead0 + offset)
            prefetch(ahead1 + offset)
            prefetch(ahead2 + offset)
            prefetch(ahead3 + offset)
    for d in range(whole, dim):
        y[m, d] += (factor0 * widen(experts[i0, vector, d]) + factor1 * widen(experts[i1, vector, d])) + (
            factor2 * widen(experts[i2, vector, d]) + factor3 * widen(experts[i3, vector, d])
        )


@inlined
def _add_1(experts: Any, ids: Any, vector: int, pair: int, num_pairs: int, factor: Any, y: Any, m: int) -> None:
    row_bytes = experts.shape[1] * experts.shape[2] * experts.itemsize
    ahead = experts.ctypes.data + ids[min(pair + _AHEAD, num_pairs - 1)] * row_bytes
    for offset in range(0, row_bytes, CACHE_LINE_BYTES):
        prefetch(ahead + offset)
    for d in range(y.shape[1]):
        y[m, d] += factor * widen(experts[ids[pair], vector, d])


@inlined
def _factor(weight: Any, pre_activations: Any, m: int, p: int, activation: int, constants: Any) -> Any:
    """weight * the coefficient of v."""
    if len(pre_activations) > 0:
        weight *= _activate(pre_activations[0, m, p], activation, constants)
    if len(pre_activations) > 1:
        weight *= pre_activations[1, m, p]
    return weight


@kernel
def _forward(
    x: Any,
    experts: Any,
    ids_MP: Any,
    weights: Any,
    activation: int,
    constants: Any,
    y: Any,
    pre: Any,
    start: int,
    stop: int,
) -> None:
    ids, num_retrieved = ids_MP.reshape(-1), ids_MP.shape[1]
    num_pairs = stop * num_retrieved
    last, zero = experts.shape[1] - 1, constants[0]
    for m in range(start, stop):
        y[m] = zero
        for p in range(0, num_retrieved - 3, 4):
            pair = m * num_retrieved + p
            for vector in range(last):
                pre[vector, m, p], pre[vector, m, p + 1], pre[vector, m, p + 2], pre[vector, m, p + 3] = _products_of_4(
                    experts, ids[pair], ids[pair + 1], ids[pair + 2], ids[pair + 3], vector, x, m, zero
                )
            factor0 = _factor(weights[m, p], pre, m, p, activation, constants)
            factor1 = _factor(weights[m, p + 1], pre, m, p + 1, activation, constants)
            factor2 = _factor(weights[m, p + 2], pre, m, p + 2, activation, constants)
            factor3 = _factor(weights[m, p + 3], pre, m, p + 3, activation, constants)
            _add_4(experts, ids, last, pair, num_pairs, factor0, factor1, factor2, factor3, y, m, True)
        for p in range(num_retrieved // 4 * 4, num_retrieved):
            pair = m * num_retrieved + p
            for vector in range(last):
                pre[vector, m, p] = _product(experts, ids[pair], vector, x, m, zero)
            factor0 = _factor(weights[m, p], pre, m, p, activation, constants)
            _add_1(experts, ids, last, pair, num_pairs, factor0, y, m)


@kernel
def _backward(
    grad_y: Any,
    experts: Any,
    ids_MP: Any,
    weights: Any,
    coefficient: Any,
    derivatives: Any,
    constants: Any,
    grad_x: Any,
    grad_weights: Any,
    factors: Any,
    start: int,
    stop: int,
) -> None:
    ids, num_retrieved = ids_MP.reshape(-1), ids_MP.shape[1]
    num_pairs = stop * num_retrieved
    last, zero = experts.shape[1] - 1, constants[0]
    for m in range(start, stop):
        grad_x[m] = zero
        p, pair = 0, m * num_retrieved
        while p < num_retrieved:
            width = 4 if p + 4 <= num_retrieved else 1
            if width == 4:
                (grad_weights[m, p], grad_weights[m, p + 1], grad_weights[m, p + 2], grad_weights[m, p + 3]) = (
                    _products_of_4(
                        experts, ids[pair], ids[pair + 1], ids[pair + 2], ids[pair + 3], last, grad_y, m, zero
                    )
                )
            else:
                grad_weights[m, p] = _product(experts, ids[pair], last, grad_y, m, zero)
            for q in range(p, p + width):
                product = grad_weights[m, q]
                grad_weights[m, q] = product * coefficient[m, q]
                factors[last, m, q] = weights[m, q] * coefficient[m, q]
                for vector in range(last):
                    factors[vector, m, q] = product * weights[m, q] * derivatives[vector, m, q]
            for vector in range(last):
                if width == 4:
                    _add_4(
                        experts,
                        ids,
                        vector,
                        pair,
                        num_pairs,
                        factors[vector, m, p],
                        factors[vector, m, p + 1],
                        factors[vector, m, p + 2],
                        factors[vector, m, p + 3],
                        grad_x,
                        m,
                        vector == 0,
                    )
                else:
                    _add_1(experts, ids, vector, pair, num_pairs, factors[vector, m, p], grad_x, m)
            p, pair = p + width, pair + width


@inlined
def sum_row(
    order: Any, starts: Any, factors: Any, x: Any, grad_y: Any, num_retrieved: int, r: int, out: Any, out_row: int
) -> None:
    """out[out_row] = for each vector the sum over row r's pairs, as their tokens come, of factor * operand's token."""
    num_vectors, dim = out.shape[1:]
    for vector in range(num_vectors):
        operand = grad_y if vector == num_vectors - 1 else x
        for position in range(starts[r], starts[r + 1]):
            pair = order[position]
            factor, token = factors[vector, pair], pair // num_retrieved
            if position == starts[r]:
                for d in range(dim):
                    out[out_row, vector, d] = factor * operand[token, d]
            else:
                for d in range(dim):
                    out[out_row, vector, d] += factor * operand[token, d]


@kernel
def _sum_touched_rows(
    order: Any,
    starts: Any,
    factors: Any,
    x: Any,
    grad_y: Any,
    num_retrieved: int,
    grad_rows: Any,
    start: int,
    stop: int,
) -> None:
    for r in range(start, stop):
        sum_row(order, starts, factors, x, grad_y, num_retrieved, r, grad_rows, r)
