"""The sum of a token's retrieved experts in plain torch, for devices without a kernel of their own.

Must match reference.py; one vector of the experts and a chunk of tokens at a time, so that the gathered rows
[M, P, E, D] never exist whole. The token comes first in the products: the other way round, or with all vectors in one
product, torch multiplies 5 to 30 times slower on a CPU.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.ops.activation import activate, activation_derivative
from tinyexperts.ops.expert_mlp.reference import accumulation_dtype, coefficients
from tinyexperts.ops.huge_pages import prefer_huge_pages

# Elements of gathered vectors [m, P, D] that one chunk of tokens may hold. 2 MiB of fp32 stay in the cache and in
# memory that the allocator keeps: 3 times faster than chunks of 64 MiB on a CPU.
_CHUNK_ELEMENTS = 1 << 19


def _chunks(ids_MP: Tensor, model_dim: int) -> list[slice]:
    num_tokens, num_retrieved = ids_MP.shape
    chunk = max(1, _CHUNK_ELEMENTS // max(1, num_retrieved * model_dim))
    return [slice(start, start + chunk) for start in range(0, num_tokens, chunk)]


def _gather(experts_NED: Tensor, vector: int, ids_MP: Tensor, scales_NE: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One vector of each retrieved expert [M, P, D] as numbers to compute with."""
    num_vectors, model_dim = experts_NED.shape[1:]
    numbers = ids_MP.flatten() * num_vectors + vector
    vectors = experts_NED.reshape(-1, model_dim).index_select(0, numbers).to(dtype)
    if scales_NE is not None:
        vectors = vectors * scales_NE.reshape(-1, 1).index_select(0, numbers).to(dtype)
    return vectors.view(*ids_MP.shape, model_dim)


def _weighted_sum(
    experts_NED: Tensor, vector: int, ids_MP: Tensor, factors_MP: Tensor, scales_NE: Tensor | None
) -> Tensor:
    """The sum of factor * vector over a token's experts [M, D], in the factors' type."""
    if scales_NE is None and experts_NED.dtype == factors_MP.dtype:  # read where they are: 3 times faster on a CPU
        num_vectors, model_dim = experts_NED.shape[1:]
        numbers = ids_MP * num_vectors + vector
        return F.embedding_bag(numbers, experts_NED.reshape(-1, model_dim), mode="sum", per_sample_weights=factors_MP)
    return torch.einsum("mp,mpd->md", factors_MP, _gather(experts_NED, vector, ids_MP, scales_NE, factors_MP.dtype))


def expert_mlp(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales_NE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [M, D] and the pre-activations [E - 1, M, P]."""
    num_vectors, model_dim = experts_NED.shape[1:]
    y = torch.empty_like(x_MD, memory_format=torch.contiguous_format)
    dtype = accumulation_dtype(x_MD, experts_NED)
    pre_activations = x_MD.new_empty((num_vectors - 1, *ids_MP.shape), dtype=dtype)
    for tokens in _chunks(ids_MP, model_dim):
        x, ids, factor = x_MD[tokens].to(dtype), ids_MP[tokens], weights_MP[tokens].to(dtype)
        for vector in range(num_vectors - 1):
            u_MPD = _gather(experts_NED, vector, ids, scales_NE, dtype)
            pre_activations[vector, tokens] = torch.einsum("md,mpd->mp", x, u_MPD)
        if activation is not None:
            factor = factor * coefficients(pre_activations[:, tokens], activation)
        y[tokens] = _weighted_sum(experts_NED, num_vectors - 1, ids, factor, scales_NE).to(x_MD.dtype)
    return y, pre_activations


def expert_mlp_backward(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    pre_activations_FMP: Tensor,
    activation: str | None,
    scales_NE: Tensor | None = None,
    *,
    table_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the touched rows (ascending ids [R], values [R, E, D]) and of the weights.

    R = 0 where the table's gradient is not asked for (a frozen table).
    """
    num_vectors, model_dim = experts_NED.shape[1:]
    dtype = accumulation_dtype(x_MD, experts_NED)
    grad_x = torch.zeros_like(x_MD, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(weights_MP, memory_format=torch.contiguous_format)
    # What multiplies x (for u and w) or grad_y (for v) in the gradient of an expert, one number a pair and vector.
    factors_EMP = pre_activations_FMP.new_empty((num_vectors, *ids_MP.shape), dtype=dtype)
    for tokens in _chunks(ids_MP, model_dim):
        ids, weights = ids_MP[tokens], weights_MP[tokens].to(dtype)
        v_MPD = _gather(experts_NED, num_vectors - 1, ids, scales_NE, dtype)
        grad_scaled_MP = torch.einsum("md,mpd->mp", grad_y_MD[tokens].to(dtype), v_MPD)
        if activation is None:
            grad_weights[tokens], factors_EMP[-1, tokens] = grad_scaled_MP, weights
            continue
        pre = pre_activations_FMP[:, tokens]
        coefficient = coefficients(pre, activation)
        grad_weights[tokens] = grad_scaled_MP * coefficient
        factors_EMP[-1, tokens] = weights * coefficient
        factors_EMP[0, tokens] = grad_scaled_MP * weights * activation_derivative(pre[0], activation)
        if len(pre) == 2:
            factors_EMP[0, tokens] *= pre[1]
            factors_EMP[1, tokens] = grad_scaled_MP * weights * activate(pre[0], activation)
        grad = torch.zeros_like(x_MD[tokens], dtype=dtype)
        for vector in range(num_vectors - 1):
            grad += _weighted_sum(experts_NED, vector, ids, factors_EMP[vector, tokens], scales_NE)
        grad_x[tokens] = grad.to(x_MD.dtype)
    if not table_gradient:
        return grad_x, ids_MP.new_empty(0), experts_NED.new_empty(0, num_vectors, model_dim), grad_weights
    operands = [x_MD.to(dtype)] * (num_vectors - 1) + [grad_y_MD.to(dtype)]
    rows, grad_rows_RED = _sum_by_expert(ids_MP, factors_EMP, operands)
    return grad_x, rows, grad_rows_RED.to(experts_NED.dtype), grad_weights


def _sum_by_expert(ids_MP: Tensor, factors_EMP: Tensor, operands_MD: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Touched ids [R], ascending, and for each vector e the sum over an expert's pairs of factor * operand's token.

    Pairs are sorted stably by expert, so that a row is one bag, summed by one thread in the order of the tokens. The
    bags come in chunks, since the memory of one large result would be new each time, and cost more than the sums.
    """
    num_pairs, model_dim = ids_MP.numel(), operands_MD[0].shape[1]
    sorted_ids, order = ids_MP.flatten().sort(stable=True)
    rows, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    starts = counts.cumsum(0) - counts
    tokens = order // max(1, ids_MP.shape[1])
    sums_RED = prefer_huge_pages(factors_EMP.new_empty((len(rows), len(operands_MD), model_dim)))
    chunk = max(1, _CHUNK_ELEMENTS // model_dim)
    first_pairs = [*starts[::chunk].tolist(), num_pairs]
    for vector, operand_MD in enumerate(operands_MD):
        factors = factors_EMP[vector].flatten()[order]
        for number, (first, last) in enumerate(pairwise(first_pairs)):
            bags = slice(number * chunk, (number + 1) * chunk)
            sums_RED[bags, vector] = F.embedding_bag(
                tokens[first:last],
                operand_MD,
                starts[bags] - first,
                mode="sum",
                per_sample_weights=factors[first:last],
            )
    return rows, sums_RED
