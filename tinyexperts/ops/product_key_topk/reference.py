"""Retrieval with product keys by looking at every score: the truth that every kernel of this operation must match.

Expert (i, j) has the id i*S + j and the score s1[i] + s2[j], where s1 = q1 . c_i and s2 = q2 . c'_j (paper, section 2).
All N = S^2 scores are sorted by (score descending, id ascending). Gradients are autograd's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_scores(query_MHQ: Tensor, sub_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of the sub-keys of each half, both [M, H, S] in fp32 (fp64 for fp64 queries)."""
    dtype = torch.promote_types(query_MHQ.dtype, torch.float32)
    keys_H2SQ = sub_keys.to(dtype).expand(query_MHQ.shape[1], *sub_keys.shape[-3:])
    query_1, query_2 = query_MHQ.to(dtype).chunk(2, dim=-1)
    return (
        torch.einsum("mhq,hsq->mhs", query_1, keys_H2SQ[:, 0]),
        torch.einsum("mhq,hsq->mhs", query_2, keys_H2SQ[:, 1]),
    )


def product_key_topk(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and the ids of the k best of all N experts for each query, both [M, H, K]."""
    scores_1, scores_2 = half_scores(query_MHQ, sub_keys)
    scores_MHN = (scores_1.unsqueeze(-1) + scores_2.unsqueeze(-2)).flatten(-2)
    ids = scores_MHN.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return scores_MHN.gather(-1, ids), ids
