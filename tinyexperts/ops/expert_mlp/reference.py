"""The sum of a token's retrieved experts in plain torch: the truth that every kernel of this operation must match.

One expert is one row [E, D] of the table (paper, section 2; E = 3 is its "easy extension" to gated experts):
    E = 1  (v)        e(x) = v                          a product-key memory's value
    E = 2  (u, v)     e(x) = act(u . x) v               a PEER neuron
    E = 3  (u, w, v)  e(x) = act(u . x) (w . x) v       a gated PEER neuron
and y = sum over the P retrieved of weight * e(x). Sums are kept in fp32 (fp64 for fp64) whatever the storage; an int8
table has a scale for each vector, one in 4 bits (int4.py) for each group. Gradients are autograd's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.ops.activation import activate


def expert_mlp(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y [M, D] and the pre-activations [E - 1, M, P]. Its autograd is the truth for every gradient."""
    dtype = torch.promote_types(torch.promote_types(x_MD.dtype, experts_NED.dtype), torch.float32)
    x, weights, ids = x_MD.to(dtype), weights_MP.to(dtype), ids_MP.flatten()
    # All rows at once, [M, P, E, D]. index_select, since indexing is slower on a CPU.
    rows = experts_NED.index_select(0, ids)
    if scales is not None:
        rows = numbers_of(rows, scales.index_select(0, ids), x.shape[1], dtype)
    rows_MPED = rows.to(dtype).view(*ids_MP.shape, experts_NED.shape[1], x.shape[1])
    pre_activations_FMP = torch.einsum("mped,md->emp", rows_MPED[:, :, :-1], x)
    if activation is not None:
        coefficients = activate(pre_activations_FMP[0], activation)
        weights = weights * (coefficients * pre_activations_FMP[1] if len(pre_activations_FMP) == 2 else coefficients)
    y = torch.einsum("mp,mpd->md", weights, rows_MPED[:, :, -1])
    return y.to(x_MD.dtype), pre_activations_FMP


def numbers_of(rows: Tensor, scales: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers [R, E, D] of quantized rows: int8 [R, E, D] by scales [R, E], or 4 bits by those of groups."""
    if rows.dtype == torch.int8:
        return rows.to(dtype) * scales.to(dtype).unsqueeze(-1)
    numbers = []
    for d in range(dim):
        start = d // 32 * 32
        half = (min(32, dim - start) + 1) // 2
        place, shift = (d - start, 0) if d - start < half else (d - start - half, 4)
        code = (rows[..., start // 2 + place] >> shift) & 15
        numbers.append((code.to(dtype) - 8) * scales[..., d // 32].to(dtype))
    return torch.stack(numbers, dim=-1)
