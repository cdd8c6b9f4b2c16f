"""The operator tinyexperts::product_key_topk: exact retrieval; its backward pass touches the chosen keys only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.define_operator import define_operator
from tinyexperts.ops.devices import check_one_device
from tinyexperts.ops.forward_mode import refuse_forward_mode
from tinyexperts.ops.product_key_topk import cpu, portable


def product_key_topk(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Retrieve the k experts of highest score for each query, exactly, out of N = S^2 (paper, section 2).

    Args:
        query_MHQ (float, [M, H, Q]): one query a token and head; the first Q/2 elements meet the first set of sub-keys.
        sub_keys (float, [2, S, Q/2] shared by the heads, or [H, 2, S, Q/2]): the two sets of sub-keys.
        k (int): experts to retrieve for each query, 1 <= k <= S.

    Returns:
        scores (fp32, or fp64 for fp64 queries, [M, H, K]): best first; differentiable.
        ids (int64, [M, H, K]): expert (i, j) has the id i*S + j; equal scores go to the lower id.

    Raises:
        InputError: shapes that don't fit each other, k outside 1..S, operands on several devices, or a forward-mode
            derivative (torch.func.jvp).

    Differentiable once and in reverse mode only.
    """
    num_heads, query_dim = query_MHQ.shape[1:] if query_MHQ.dim() == 3 else (0, 0)
    num_sub_keys = sub_keys.shape[-2] if sub_keys.dim() > 1 else 0
    shared = (2, num_sub_keys, query_dim // 2)
    if query_MHQ.dim() != 3 or query_dim % 2 or sub_keys.shape not in (shared, (num_heads, *shared)):
        raise InputError(
            "product_key_topk wants queries [M, H, Q] with an even Q and sub-keys [2, S, Q/2] or [H, 2, S, Q/2], "
            f"got {list(query_MHQ.shape)} and {list(sub_keys.shape)}"
        )
    if not 1 <= k <= num_sub_keys:
        raise InputError(f"k must be between 1 and the number of sub-keys a half, {num_sub_keys}, got {k}")
    check_one_device("product_key_topk", query=query_MHQ, sub_keys=sub_keys)
    refuse_forward_mode("product_key_topk", query_MHQ, sub_keys)
    scores, ids = _product_key_topk(query_MHQ, sub_keys, k)
    return scores, ids


_GPU = "tinyexperts.ops.product_key_topk.gpu"

_product_key_topk = define_operator(
    "product_key_topk", portable.product_key_topk, cpu.product_key_topk, f"{_GPU}:PRODUCT_KEY_TOPK"
)
_product_key_topk_backward = define_operator(
    "product_key_topk_backward",
    portable.product_key_topk_backward,
    cpu.product_key_topk_backward,
    f"{_GPU}:PRODUCT_KEY_TOPK_BACKWARD",
)


@_product_key_topk.register_fake
def _(query_MHQ: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*query_MHQ.shape[:2], k)
    dtype = torch.promote_types(query_MHQ.dtype, torch.float32)
    return query_MHQ.new_empty(shape, dtype=dtype), query_MHQ.new_empty(shape, dtype=torch.int64)


@_product_key_topk_backward.register_fake
def _(grad_scores: Tensor, ids: Tensor, query_MHQ: Tensor, sub_keys: Tensor) -> tuple[Tensor, Tensor]:
    return query_MHQ.new_empty(query_MHQ.shape), sub_keys.new_empty(sub_keys.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    query_MHQ, sub_keys, _ = inputs
    ctx.save_for_backward(query_MHQ, sub_keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_scores: Tensor, _grad_ids: Tensor | None) -> tuple[Tensor, Tensor, None]:
    query_MHQ, sub_keys, ids = ctx.saved_tensors
    return *_product_key_topk_backward(grad_scores, ids, query_MHQ, sub_keys), None


_product_key_topk.register_autograd(_backward, setup_context=_setup_context)
