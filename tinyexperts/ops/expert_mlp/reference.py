"""The sum of a token's retrieved experts in plain torch: the truth that every kernel of this operation must match.

One expert is one row [E, D] of the table (paper, section 2; E = 3 is its "easy extension" to gated experts):
    E = 1  (v)        e(x) = v                          a product-key memory's value
    E = 2  (u, v)     e(x) = act(u . x) v               a PEER neuron
    E = 3  (u, w, v)  e(x) = act(u . x) (w . x) v       a gated PEER neuron
and y = sum over the P retrieved of weight * e(x). Sums are kept in fp32 (fp64 for fp64) whatever the storage; an int8
table has a scale for each vector. Gradients are autograd's.
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
    scales_NE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y [M, D] and the pre-activations [E - 1, M, P]. Its autograd is the truth for every gradient."""
    dtype = torch.promote_types(torch.promote_types(x_MD.dtype, experts_NED.dtype), torch.float32)
    x, weights, ids = x_MD.to(dtype), weights_MP.to(dtype), ids_MP.flatten()
    # All rows at once, [M, P, E, D]. index_select, since indexing is slower on a CPU.
    rows = experts_NED.index_select(0, ids).to(dtype)
    if scales_NE is not None:
        rows = rows * scales_NE.index_select(0, ids).to(dtype).unsqueeze(-1)
    rows_MPED = rows.view(*ids_MP.shape, *experts_NED.shape[1:])
    pre_activations_FMP = torch.einsum("mped,md->emp", rows_MPED[:, :, :-1], x)
    if activation is not None:
        coefficients = activate(pre_activations_FMP[0], activation)
        weights = weights * (coefficients * pre_activations_FMP[1] if len(pre_activations_FMP) == 2 else coefficients)
    y = torch.einsum("mp,mpd->md", weights, rows_MPED[:, :, -1])
    return y.to(x_MD.dtype), pre_activations_FMP
