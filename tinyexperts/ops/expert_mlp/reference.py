"""The sum of a token's retrieved experts in plain torch: the truth that every kernel of this operation must match.

One expert is one row [E, D] of the table (paper, section 2; E = 3 is its "easy extension" to gated experts):
    E = 1  (v)        e(x) = v                          a product-key memory's value
    E = 2  (u, v)     e(x) = act(u . x) v               a PEER neuron
    E = 3  (u, w, v)  e(x) = act(u . x) (w . x) v       a gated PEER neuron
and y = sum over the P retrieved of weight * e(x). Sums are kept in fp32 (fp64 for fp64) whatever the storage; an int8
table has a scale for each vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.ops.activation import activate


def gather(experts_NED: Tensor, ids_MP: Tensor, scales_NE: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows [M, P, E, D] of a table as numbers to compute with; index_select is the faster way on a CPU."""
    rows = experts_NED.index_select(0, ids_MP.flatten()).to(dtype)
    if scales_NE is not None:
        rows = rows * scales_NE.index_select(0, ids_MP.flatten()).to(dtype).unsqueeze(-1)
    return rows.view(*ids_MP.shape, *experts_NED.shape[1:])


def accumulation_dtype(x_MD: Tensor, experts_NED: Tensor) -> torch.dtype:
    """fp32, or fp64 where an operand has it."""
    return torch.promote_types(torch.promote_types(x_MD.dtype, experts_NED.dtype), torch.float32)


def coefficients(pre_activations_FMP: Tensor, activation: str) -> Tensor:
    """What multiplies v in e(x), [M, P], from the products with u (and w), [E - 1, M, P]."""
    hidden = activate(pre_activations_FMP[0], activation)
    return hidden * pre_activations_FMP[1] if len(pre_activations_FMP) == 2 else hidden


def sum_of_rows(x_MD: Tensor, rows_MPED: Tensor, weights_MP: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    """y [M, D] and the pre-activations [E - 1, M, P] from the rows of each token's experts."""
    dtype = accumulation_dtype(x_MD, rows_MPED)
    x, rows, weights = x_MD.to(dtype), rows_MPED.to(dtype), weights_MP.to(dtype)
    pre_activations_FMP = torch.einsum("mped,md->emp", rows[:, :, :-1], x)
    if activation is not None:
        weights = weights * coefficients(pre_activations_FMP, activation)
    y = torch.einsum("mp,mpd->md", weights, rows[:, :, -1])
    return y.to(x_MD.dtype), pre_activations_FMP


def expert_mlp(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales_NE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [M, D] and the pre-activations [E - 1, M, P]; differentiable by plain autograd; holds [M, P, E, D] whole."""
    rows_MPED = gather(experts_NED, ids_MP, scales_NE, accumulation_dtype(x_MD, experts_NED))
    return sum_of_rows(x_MD, rows_MPED, weights_MP, activation)
