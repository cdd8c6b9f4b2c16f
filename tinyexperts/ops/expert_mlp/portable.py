"""The sum of a token's retrieved experts in plain torch, for devices without a kernel of their own.

Must match reference.py; a chunk of tokens at a time, so that the gathered rows [M, P, E, D] never exist whole.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.ops.activation import activate, activation_derivative
from tinyexperts.ops.expert_mlp import reference
from tinyexperts.ops.expert_mlp.reference import accumulation_dtype, coefficients, gather
from tinyexperts.ops.huge_pages import prefer_huge_pages

# Elements of gathered rows [m, P, E, D] that one chunk of tokens may hold. 4 MiB of fp32 stay in the cache and in
# memory that the allocator keeps: 3 times faster than chunks of 64 MiB on a CPU.
_CHUNK_ELEMENTS = 1 << 20


def _chunks(num_tokens: int, elements_per_token: int) -> list[slice]:
    chunk = max(1, _CHUNK_ELEMENTS // max(1, elements_per_token))
    return [slice(start, start + chunk) for start in range(0, num_tokens, chunk)]


def expert_mlp(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales_NE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [M, D] and the pre-activations [E - 1, M, P]."""
    num_tokens, num_retrieved = ids_MP.shape
    num_vectors, model_dim = experts_NED.shape[1:]
    y = torch.empty_like(x_MD, memory_format=torch.contiguous_format)
    dtype = accumulation_dtype(x_MD, experts_NED)
    pre_activations = x_MD.new_empty((num_vectors - 1, num_tokens, num_retrieved), dtype=dtype)
    for tokens in _chunks(num_tokens, num_retrieved * num_vectors * model_dim):
        rows_MPED = gather(experts_NED, ids_MP[tokens], scales_NE, dtype)
        y[tokens], pre_activations[:, tokens] = reference.sum_of_rows(
            x_MD[tokens], rows_MPED, weights_MP[tokens], activation
        )
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
    for tokens in _chunks(len(ids_MP), ids_MP.shape[1] * num_vectors * model_dim):
        rows_MPED = gather(experts_NED, ids_MP[tokens], scales_NE, dtype)
        weights = weights_MP[tokens].to(dtype)
        grad_scaled_MP = torch.einsum("mpd,md->mp", rows_MPED[:, :, -1], grad_y_MD[tokens].to(dtype))
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
        grad_x[tokens] = torch.einsum("emp,mped->md", factors_EMP[:-1, tokens], rows_MPED[:, :, :-1]).to(x_MD.dtype)
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
