"""The sum of a token's retrieved experts on the CPU; must match reference.py.

A token's experts are visited in groups of four: their products with the token, the activation, then one pass that adds
all four to the output (simd.py). The backward pass is the same with other vectors; it also writes a factor for each
pair (a token and one of its experts) and vector, from which row_sums.py sums the gradient of each touched row.

Every token is summed by one thread in a fixed order: the bits don't depend on the number of threads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.ops.cpu.compile import array_of, array_of_weights, inlined, kernel
from tinyexperts.ops.cpu.threads import parallel_for
from tinyexperts.ops.expert_mlp.portable import accumulation_dtype, coefficients, derivatives, spread_rows
from tinyexperts.ops.expert_mlp.row_sums import find_touched_rows, sum_gradient_rows
from tinyexperts.ops.expert_mlp.simd import (
    add_1,
    add_4,
    pairs_ahead,
    prefetch_scales_of_4,
    products_of_1,
    products_of_4,
)
from tinyexperts.ops.indices import check_indices

# Elements of gathered rows that are worth a part of their own.
_MIN_ELEMENTS = 1 << 16

_ACTIVATION_NUMBERS = {None: 0, "gelu": 1, "relu": 2, "relu2": 3, "silu": 4}


def expert_mlp(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales: Tensor | None = None,
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return y [M, D] and the pre-activations [E - 1, M, P]. Only the backward pass reads `sparse`."""
    check_indices("ids", ids_MP, len(experts_NED))
    num_tokens, num_retrieved = ids_MP.shape
    num_vectors = experts_NED.shape[1]
    dtype = accumulation_dtype(x_MD, experts_NED)
    y = torch.empty(x_MD.shape, dtype=dtype, device="cpu")
    pre_activations = torch.empty((num_vectors - 1, num_tokens, num_retrieved), dtype=dtype, device="cpu")
    parallel_for(
        _forward,
        num_tokens,
        array_of(x_MD.to(dtype)),
        array_of_weights(experts_NED),
        array_of(ids_MP),
        array_of(weights_MP.to(dtype)),
        _array_of_scales(scales, dtype),
        _ACTIVATION_NUMBERS[activation],
        _constants(dtype),
        array_of(y),
        array_of(pre_activations),
        min_items=min_tokens(experts_NED, num_retrieved),
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
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and of the weights, and the factors [E, M, P] of the table's gradient.

    A factor multiplies x (for u and w) or grad_y (for v) in the gradient of an expert: one number a pair and vector,
    in the type of the computation.
    """
    dtype = accumulation_dtype(x_MD, experts_NED)
    grad_x = torch.empty(x_MD.shape, dtype=dtype, device="cpu")
    grad_weights = torch.empty(weights_MP.shape, dtype=dtype, device="cpu")
    factors_EMP = torch.empty((experts_NED.shape[1], *ids_MP.shape), dtype=dtype, device="cpu")
    # Without an activation v's factor is the router weight alone, and there are no products to derive it by.
    coefficient, by_product = torch.ones_like(weights_MP), pre_activations_FMP
    if activation is not None:
        coefficient = coefficients(pre_activations_FMP, activation)
        by_product = derivatives(pre_activations_FMP, activation)
    parallel_for(
        _backward,
        len(x_MD),
        array_of(grad_y_MD.to(dtype)),
        array_of_weights(experts_NED),
        array_of(ids_MP),
        array_of(weights_MP.to(dtype)),
        array_of(coefficient.to(dtype)),
        array_of(by_product.to(dtype)),
        _array_of_scales(scales, dtype),
        _constants(dtype),
        array_of(grad_x),
        array_of(grad_weights),
        array_of(factors_EMP),
        min_items=min_tokens(experts_NED, ids_MP.shape[1]),
    )
    return grad_x.to(x_MD.dtype), grad_weights.to(weights_MP.dtype), factors_EMP


def gradient_rows(
    ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the touched rows [R], ascending, and their gradients [R, E, D], in the table's type."""
    rows, order, starts = find_touched_rows(ids_MP)
    return rows, sum_gradient_rows(order, starts, factors_EMP, x_MD, grad_y_MD).to(experts_NED.dtype)


def dense_gradient(ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor) -> Tensor:
    """Return the gradient of the whole table [N, E, D], in its type."""
    return spread_rows(*gradient_rows(ids_MP, factors_EMP, x_MD, grad_y_MD, experts_NED), experts_NED.shape)


def min_tokens(experts_NED: Tensor, num_retrieved: int) -> int:
    """Return the number of tokens that are worth a part of their own."""
    return max(1, _MIN_ELEMENTS // max(1, num_retrieved * experts_NED.shape[1] * experts_NED.shape[2]))


def _array_of_scales(scales: Tensor | None, dtype: torch.dtype) -> Any:
    """Return the scales of vectors [N, E] or of groups [N, E, G], or an empty array where the table has none."""
    if scales is None:
        return no_scales(dtype)
    # Those of vectors are few, and those of groups too many to copy.
    few = scales.dim() == 2 or scales.dtype == torch.float64
    return array_of(scales.to(dtype)) if few else array_of_weights(scales)


@functools.cache
def no_scales(dtype: torch.dtype) -> Any:
    """Return the scales of a table that has none."""
    return array_of(torch.empty((0, 0), dtype=dtype, device="cpu"))


@functools.cache
def _constants(dtype: torch.dtype) -> Any:
    """Return 0, 1/2 and sqrt(1/2) in the type of the computation: Python's literals would widen fp32 to fp64."""
    return np.array([0.0, 0.5, math.sqrt(0.5)], dtype=np.float64 if dtype == torch.float64 else np.float32)


@inlined
def _activate(h: Any, activation: int, constants: Any) -> Any:
    """Return act(h)."""
    zero, half, root_half = constants[0], constants[1], constants[2]
    if activation == 1:
        return h * half * (half + half + math.erf(h * root_half))
    if activation == 4:
        return h / (half + half + math.exp(-h))
    positive = zero if h < zero else h  # NaN stays
    return positive * positive if activation == 3 else positive


@inlined
def _scale(scales: Any, i: int, vector: int, one: Any) -> Any:
    """Return the scale of a whole vector: 1 if it has none, or one for each group, which is applied there."""
    if scales.ndim == 2:
        return scales[i, vector] if len(scales) > 0 else one
    return one


@inlined
def _coefficient(h: Any, vector: int, activation: int, constants: Any) -> Any:
    """Return the part of v's factor that comes from the product with a vector: act(u . x), or w . x."""
    return _activate(h, activation, constants) if vector == 0 else h


@kernel
def _forward(
    x: Any,
    experts: Any,
    ids_MP: Any,
    weights: Any,
    scales: Any,
    activation: int,
    constants: Any,
    y: Any,
    pre: Any,
    start: int,
    stop: int,
) -> None:
    """Compute y and the pre-activations of the tokens start..stop."""
    ids, num_retrieved = ids_MP.reshape(-1), ids_MP.shape[1]
    last, zero, one, ahead = experts.shape[1] - 1, constants[0], constants[1] + constants[1], pairs_ahead(experts)
    for m in range(start, stop):
        y[m] = zero
        # Four experts at a time: the token's lanes are loaded once for all four, and so are y's.
        for p in range(0, num_retrieved - 3, 4):
            pair = m * num_retrieved + p
            i0, i1, i2, i3 = ids[pair], ids[pair + 1], ids[pair + 2], ids[pair + 3]
            # products_of_4 and add_4 prefetch the vectors themselves.
            prefetch_scales_of_4(scales, ids, pair + ahead)
            # The factors of v begin with the router weights. In variables: read back from `pre`, the products would
            # cost a fifth of the arithmetic.
            factor0, factor1, factor2, factor3 = weights[m, p], weights[m, p + 1], weights[m, p + 2], weights[m, p + 3]
            # u, and w of gated experts. A scale is a factor of the whole product, and so applied once, not to elements.
            for vector in range(last):
                h0, h1, h2, h3 = products_of_4(experts, scales, ids, pair, pair + ahead, vector, x, m)
                h0, h1 = h0 * _scale(scales, i0, vector, one), h1 * _scale(scales, i1, vector, one)
                h2, h3 = h2 * _scale(scales, i2, vector, one), h3 * _scale(scales, i3, vector, one)
                # Kept for the backward pass, which needs the activation's derivative there.
                pre[vector, m, p], pre[vector, m, p + 1], pre[vector, m, p + 2], pre[vector, m, p + 3] = h0, h1, h2, h3
                factor0 *= _coefficient(h0, vector, activation, constants)
                factor1 *= _coefficient(h1, vector, activation, constants)
                factor2 *= _coefficient(h2, vector, activation, constants)
                factor3 *= _coefficient(h3, vector, activation, constants)
            # v's own scale, and all four experts into y in one pass.
            factor0, factor1 = factor0 * _scale(scales, i0, last, one), factor1 * _scale(scales, i1, last, one)
            factor2, factor3 = factor2 * _scale(scales, i2, last, one), factor3 * _scale(scales, i3, last, one)
            add_4(experts, scales, ids, pair, pair + ahead, last, (factor0, factor1, factor2, factor3), y, m)
        # The same for the remaining experts, three at most.
        for p in range(num_retrieved // 4 * 4, num_retrieved):
            pair = m * num_retrieved + p
            factor0 = weights[m, p]
            for vector in range(last):
                h0 = products_of_1(experts, scales, ids, pair, pair + ahead, vector, x, m)[0]
                h0 *= _scale(scales, ids[pair], vector, one)
                pre[vector, m, p] = h0
                factor0 *= _coefficient(h0, vector, activation, constants)
            add_1(
                experts, scales, ids, pair, pair + ahead, last, (factor0 * _scale(scales, ids[pair], last, one),), y, m
            )


@inlined
def _write_pair(
    grad_value: Any, m: int, p: int, weights: Any, coefficient: Any, derivatives: Any, grad_weights: Any, factors: Any
) -> None:
    """Write the weight's gradient and the factors of one pair, from the product of its v with grad_y."""
    last = len(factors) - 1
    # y holds weight * coefficient * v, so the weight's gradient is coefficient * (v . grad_y),
    grad_weights[m, p] = grad_value * coefficient[m, p]
    # v's is weight * coefficient times grad_y,
    factors[last, m, p] = weights[m, p] * coefficient[m, p]
    # and u's and w's are the derivatives of the coefficient times x.
    for vector in range(last):
        factors[vector, m, p] = grad_value * weights[m, p] * derivatives[vector, m, p]


@kernel
def _backward(
    grad_y: Any,
    experts: Any,
    ids_MP: Any,
    weights: Any,
    coefficient: Any,
    derivatives: Any,
    scales: Any,
    constants: Any,
    grad_x: Any,
    grad_weights: Any,
    factors: Any,
    start: int,
    stop: int,
) -> None:
    """Compute the gradients of x and of the weights, and the factors, of the tokens start..stop."""
    ids, num_retrieved = ids_MP.reshape(-1), ids_MP.shape[1]
    last, zero, one, ahead = experts.shape[1] - 1, constants[0], constants[1] + constants[1], pairs_ahead(experts)
    for m in range(start, stop):
        grad_x[m] = zero
        # As forward, with the vectors' parts exchanged: v is multiplied with grad_y, u and w are added to grad_x.
        for p in range(0, num_retrieved - 3, 4):
            pair = m * num_retrieved + p
            i0, i1, i2, i3 = ids[pair], ids[pair + 1], ids[pair + 2], ids[pair + 3]
            prefetch_scales_of_4(scales, ids, pair + ahead)
            # Each expert's v . grad_y, the gradient of its whole factor.
            h0, h1, h2, h3 = products_of_4(experts, scales, ids, pair, pair + ahead, last, grad_y, m)
            h0, h1 = h0 * _scale(scales, i0, last, one), h1 * _scale(scales, i1, last, one)
            h2, h3 = h2 * _scale(scales, i2, last, one), h3 * _scale(scales, i3, last, one)
            # The table's gradient is not summed here: an expert's pairs are spread over tokens, and threads.
            _write_pair(h0, m, p, weights, coefficient, derivatives, grad_weights, factors)
            _write_pair(h1, m, p + 1, weights, coefficient, derivatives, grad_weights, factors)
            _write_pair(h2, m, p + 2, weights, coefficient, derivatives, grad_weights, factors)
            _write_pair(h3, m, p + 3, weights, coefficient, derivatives, grad_weights, factors)
            # The factors that multiply x in u's and w's gradient multiply u and w in x's.
            for vector in range(last):
                scaled = (
                    factors[vector, m, p] * _scale(scales, i0, vector, one),
                    factors[vector, m, p + 1] * _scale(scales, i1, vector, one),
                    factors[vector, m, p + 2] * _scale(scales, i2, vector, one),
                    factors[vector, m, p + 3] * _scale(scales, i3, vector, one),
                )
                add_4(experts, scales, ids, pair, pair + ahead, vector, scaled, grad_x, m)
        # The same for the remaining experts, three at most.
        for p in range(num_retrieved // 4 * 4, num_retrieved):
            pair = m * num_retrieved + p
            h0 = products_of_1(experts, scales, ids, pair, pair + ahead, last, grad_y, m)[0]
            h0 *= _scale(scales, ids[pair], last, one)
            _write_pair(h0, m, p, weights, coefficient, derivatives, grad_weights, factors)
            for vector in range(last):
                factor = factors[vector, m, p] * _scale(scales, ids[pair], vector, one)
                add_1(experts, scales, ids, pair, pair + ahead, vector, (factor,), grad_x, m)
