"""The two steps of expert_mlp apart on the CPU: products with the experts' vectors, and weighted sums of them.

They take the loop order of cpu.py, and are for tables whose columns are on several ranks, where a product is whole only
after its parts have been summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyexperts.ops.cpu.compile import array_of, array_of_weights, kernel
from tinyexperts.ops.cpu.threads import parallel_for
from tinyexperts.ops.expert_mlp.cpu import min_tokens, no_scales
from tinyexperts.ops.expert_mlp.simd import add_1, add_4, pairs_ahead, products_of_1, products_of_4


def products(x_MD: Tensor, experts_NED: Tensor, ids_MP: Tensor, first: int, count: int) -> Tensor:
    """Return the products of x with `count` vectors from `first` on of each token's experts, [count, M, P]."""
    out = torch.empty((count, *ids_MP.shape), dtype=x_MD.dtype, device="cpu")
    parallel_for(
        _products,
        len(x_MD),
        array_of(x_MD),
        array_of_weights(experts_NED),
        no_scales(x_MD.dtype),
        array_of(ids_MP),
        first,
        array_of(out),
        min_items=min_tokens(experts_NED, ids_MP.shape[1]),
    )
    return out


def weighted_sum(factors_FMP: Tensor, experts_NED: Tensor, ids_MP: Tensor, first: int) -> Tensor:
    """Return the sum over a token's experts and F vectors from `first` on of factor * vector, [M, D]."""
    y = torch.empty((len(ids_MP), experts_NED.shape[2]), dtype=factors_FMP.dtype, device="cpu")
    parallel_for(
        _weighted_sum,
        len(y),
        array_of(factors_FMP),
        array_of_weights(experts_NED),
        no_scales(factors_FMP.dtype),
        array_of(ids_MP),
        first,
        array_of(y),
        min_items=min_tokens(experts_NED, ids_MP.shape[1]),
    )
    return y


@kernel
def _products(x: Any, experts: Any, scales: Any, ids_MP: Any, first: int, out: Any, start: int, stop: int) -> None:
    ids, num_retrieved, ahead = ids_MP.reshape(-1), ids_MP.shape[1], pairs_ahead(experts)
    for m in range(start, stop):
        for p in range(0, num_retrieved - 3, 4):
            pair = m * num_retrieved + p
            for v in range(len(out)):
                out[v, m, p], out[v, m, p + 1], out[v, m, p + 2], out[v, m, p + 3] = products_of_4(
                    experts, scales, ids, pair, pair + ahead, first + v, x, m
                )
        for p in range(num_retrieved // 4 * 4, num_retrieved):
            pair = m * num_retrieved + p
            for v in range(len(out)):
                out[v, m, p] = products_of_1(experts, scales, ids, pair, pair + ahead, first + v, x, m)[0]


@kernel
def _weighted_sum(
    factors: Any, experts: Any, scales: Any, ids_MP: Any, first: int, y: Any, start: int, stop: int
) -> None:
    ids, num_retrieved, ahead = ids_MP.reshape(-1), ids_MP.shape[1], pairs_ahead(experts)
    for m in range(start, stop):
        y[m] = 0
        for p in range(0, num_retrieved - 3, 4):
            pair = m * num_retrieved + p
            for v in range(len(factors)):
                four = factors[v, m, p], factors[v, m, p + 1], factors[v, m, p + 2], factors[v, m, p + 3]
                add_4(experts, scales, ids, pair, pair + ahead, first + v, four, y, m)
        for p in range(num_retrieved // 4 * 4, num_retrieved):
            pair = m * num_retrieved + p
            for v in range(len(factors)):
                add_1(experts, scales, ids, pair, pair + ahead, first + v, (factors[v, m, p],), y, m)
