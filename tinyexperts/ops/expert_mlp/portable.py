"""The sum of a token's retrieved experts in plain torch, for devices without a kernel of their own.

Must match reference.py; one vector of the experts and a chunk of tokens are gathered at a time, so that the rows
[M, P, E, D] never exist whole. The token comes first in the products: the other way round, or with all vectors in one
product, torch multiplies 5 to 30 times slower on a CPU.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.ops.activation import activate, activation_derivative
from tinyexperts.ops.cpu.huge_pages import prefer_huge_pages
from tinyexperts.ops.expert_mlp.int4 import unpack_groups
from tinyexperts.ops.indices import check_indices

# Elements of gathered vectors [m, P, D] that one chunk of tokens may hold: 2 MiB of fp32 stay in the cache of a CPU. On
# an accelerator each chunk costs launches, and 512 MiB are little.
_CHUNK_ELEMENTS = 1 << 19
_CHUNK_ELEMENTS_OF_ACCELERATORS = 1 << 27


def accumulation_dtype(x_MD: Tensor, experts_NED: Tensor) -> torch.dtype:
    """Return the type that sums are kept in: fp32, or fp64 where an operand has it."""
    return torch.promote_types(torch.promote_types(x_MD.dtype, experts_NED.dtype), torch.float32)


def coefficients(pre_activations_FMP: Tensor, activation: str) -> Tensor:
    """Return the factors of v in e(x), [M, P], from the products with u (and w), [E - 1, M, P]."""
    hidden = activate(pre_activations_FMP[0], activation)
    return hidden * pre_activations_FMP[1] if len(pre_activations_FMP) == 2 else hidden


def derivatives(pre_activations_FMP: Tensor, activation: str) -> Tensor:
    """Return the derivatives of these factors by each product, [E - 1, M, P]."""
    derivative = activation_derivative(pre_activations_FMP[0], activation)
    if len(pre_activations_FMP) == 1:
        return derivative.unsqueeze(0)
    return torch.stack([derivative * pre_activations_FMP[1], activate(pre_activations_FMP[0], activation)])


def chunk_elements(device: torch.device) -> int:
    """Return the elements of gathered vectors that one chunk may hold."""
    return _CHUNK_ELEMENTS if device.type == "cpu" else _CHUNK_ELEMENTS_OF_ACCELERATORS


class _Vectors:
    """The vectors of a table's experts, as numbers of type `dtype`, for the tokens that retrieved them.

    They are gathered in chunks of tokens. A table of another type is converted in memory that is used again: on a CPU,
    fresh pages would cost more than the gathering.
    """

    def __init__(
        self, experts_NED: Tensor, scales: Tensor | None, ids_MP: Tensor, dim: int, dtype: torch.dtype
    ) -> None:
        self._num_vectors, self._dim, self._dtype, self._ids_MP = experts_NED.shape[1], dim, dtype, ids_MP
        self._flat_experts, self._flat_scales = experts_NED.flatten(0, 1), None
        if scales is not None:
            self._flat_scales = (scales.unsqueeze(2) if scales.dim() == 2 else scales).flatten(0, 1)
        num_tokens, num_retrieved = ids_MP.shape
        chunk = max(1, min(num_tokens, chunk_elements(experts_NED.device) // max(1, num_retrieved * self._dim)))
        self._chunks = [slice(start, start + chunk) for start in range(0, num_tokens, chunk)]
        self._on_cpu = experts_NED.device.type == "cpu"
        self._converted = experts_NED.dtype != dtype
        if self._converted:
            self._stored = experts_NED.new_empty(chunk * num_retrieved, experts_NED.shape[2])
            self._numbers = experts_NED.new_empty(chunk * num_retrieved, dim, dtype=dtype)

    def products(self, x_MD: Tensor, vector: int) -> Tensor:
        """Return the products of each token with one vector of each of its experts, [M, P]."""
        out = x_MD.new_empty(self._ids_MP.shape, dtype=self._dtype)
        for tokens in self._chunks:
            out[tokens] = torch.einsum("md,mpd->mp", x_MD[tokens].to(self._dtype), self._gather(vector, tokens))
        return out

    def weighted_sum(self, factors_MP: Tensor, vector: int) -> Tensor:
        """Return the sum of factor * vector over each token's experts, [M, D]."""
        if not self._converted and self._on_cpu:  # read where they are: 3 times faster there
            positions = self._ids_MP * self._num_vectors + vector
            return F.embedding_bag(positions, self._flat_experts, mode="sum", per_sample_weights=factors_MP)
        out = factors_MP.new_empty((len(factors_MP), self._dim))
        for tokens in self._chunks:
            out[tokens] = torch.einsum("mp,mpd->md", factors_MP[tokens], self._gather(vector, tokens))
        return out

    def _gather(self, vector: int, tokens: slice) -> Tensor:
        ids_MP = self._ids_MP[tokens]
        positions = ids_MP.flatten() * self._num_vectors + vector
        if not self._converted:
            if self._on_cpu:  # by bags of one: their sum prefetches there, index_select does not
                rows = F.embedding_bag(positions[:, None], self._flat_experts, mode="sum")
            else:
                rows = self._flat_experts.index_select(0, positions)
            return rows.view(*ids_MP.shape, self._dim)
        stored, numbers = self._stored[: len(positions)], self._numbers[: len(positions)]
        torch.index_select(self._flat_experts, 0, positions, out=stored)
        scales = None if self._flat_scales is None else self._flat_scales.index_select(0, positions)
        if stored.dtype == torch.uint8:
            assert scales is not None
            return unpack_groups(stored, scales, numbers).view(*ids_MP.shape, self._dim)
        numbers.copy_(stored)
        if scales is not None:
            numbers *= scales.to(self._dtype)
        return numbers.view(*ids_MP.shape, self._dim)


def products(x_MD: Tensor, experts_NED: Tensor, ids_MP: Tensor, first: int, count: int) -> Tensor:
    """Return the products of x with `count` vectors from `first` on of each token's experts, [count, M, P]."""
    vectors = _Vectors(experts_NED, None, ids_MP, experts_NED.shape[2], x_MD.dtype)
    return torch.stack([vectors.products(x_MD, vector) for vector in range(first, first + count)])


def weighted_sum(factors_FMP: Tensor, experts_NED: Tensor, ids_MP: Tensor, first: int) -> Tensor:
    """Return the sum over a token's experts and F vectors from `first` on of factor * vector, [M, D]."""
    vectors = _Vectors(experts_NED, None, ids_MP, experts_NED.shape[2], factors_FMP.dtype)
    y = factors_FMP.new_zeros((len(ids_MP), experts_NED.shape[2]))
    for vector, factors_MP in enumerate(factors_FMP, start=first):
        y += vectors.weighted_sum(factors_MP, vector)
    return y


def expert_mlp(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales: Tensor | None,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """Return y [M, D] and the pre-activations [E - 1, M, P]. Only the backward pass reads `sparse`."""
    check_indices("ids", ids_MP, len(experts_NED))
    last = experts_NED.shape[1] - 1
    dtype = accumulation_dtype(x_MD, experts_NED)
    vectors = _Vectors(experts_NED, scales, ids_MP, x_MD.shape[1], dtype)
    pre_activations = x_MD.new_empty((last, *ids_MP.shape), dtype=dtype)
    for vector in range(last):
        pre_activations[vector] = vectors.products(x_MD, vector)
    factors = weights_MP.to(dtype)
    if activation is not None:
        factors = factors * coefficients(pre_activations, activation)
    return vectors.weighted_sum(factors, last).to(x_MD.dtype), pre_activations


def expert_mlp_backward(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    pre_activations_FMP: Tensor,
    activation: str | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and of the weights, and the factors [E, M, P] of the table's gradient.

    A factor multiplies x (for u and w) or grad_y (for v) in the gradient of an expert: one number a pair and vector.
    """
    num_vectors = experts_NED.shape[1]
    last = num_vectors - 1
    dtype = accumulation_dtype(x_MD, experts_NED)
    factors_EMP = pre_activations_FMP.new_empty((num_vectors, *ids_MP.shape), dtype=dtype)
    vectors = _Vectors(experts_NED, scales, ids_MP, x_MD.shape[1], dtype)
    weights, grad_scaled_MP = weights_MP.to(dtype), vectors.products(grad_y_MD, last)
    grad_x = torch.zeros_like(x_MD, dtype=dtype, memory_format=torch.contiguous_format)
    if activation is None:
        grad_weights, factors_EMP[-1] = grad_scaled_MP, weights
    else:
        pre = pre_activations_FMP
        coefficient = coefficients(pre, activation)
        grad_weights, factors_EMP[-1] = grad_scaled_MP * coefficient, weights * coefficient
        factors_EMP[0] = grad_scaled_MP * weights * activation_derivative(pre[0], activation)
        if len(pre) == 2:
            factors_EMP[0] *= pre[1]
            factors_EMP[1] = grad_scaled_MP * weights * activate(pre[0], activation)
        for vector in range(last):
            grad_x += vectors.weighted_sum(factors_EMP[vector], vector)
    return grad_x.to(x_MD.dtype), grad_weights.to(weights_MP.dtype), factors_EMP


def gradient_rows(
    ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the touched rows [R], ascending, and their gradients [R, E, D], in the table's type.

    The gradient of a vector is the sum over its expert's pairs of factor * token of grad_y (for v) or x (the others).
    Pairs are sorted stably by expert, so that a row is one bag, summed by one thread in the order of the tokens. The
    bags come in chunks, since the memory of one large result would be new each time, and cost more than the sums.
    """
    num_pairs, model_dim = ids_MP.numel(), x_MD.shape[1]
    operands_MD = [x_MD.to(factors_EMP.dtype)] * (len(factors_EMP) - 1) + [grad_y_MD.to(factors_EMP.dtype)]
    sorted_ids, order = ids_MP.flatten().sort(stable=True)
    rows, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    starts = counts.cumsum(0) - counts
    tokens = order // max(1, ids_MP.shape[1])
    sums_RED = prefer_huge_pages(factors_EMP.new_empty((len(rows), len(operands_MD), model_dim)))
    chunk = max(1, chunk_elements(ids_MP.device) // model_dim)
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
    return rows, sums_RED.to(experts_NED.dtype)


def dense_gradient(ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor) -> Tensor:
    """Return the gradient of the whole table [N, E, D], in its type."""
    return spread_rows(*gradient_rows(ids_MP, factors_EMP, x_MD, grad_y_MD, experts_NED), experts_NED.shape)


def spread_rows(rows: Tensor, grad_rows_RED: Tensor, shape: torch.Size) -> Tensor:
    """Return a table of zeros with the touched rows in their places."""
    return grad_rows_RED.new_zeros(shape).index_copy_(0, rows, grad_rows_RED)
