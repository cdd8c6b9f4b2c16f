"""Layers of PEER-pytorch 0.2.2 and product-key-memory 0.3.0 as layers of this package, with copies of their weights.

A state dict doesn't say with which options a layer was made, so the live module is read. Neither package is imported
here: the module's class tells where it comes from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers.feed_forward import FeedForward
from tinyexperts.layers.peer import PEER
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.layers.product_key_memory import ProductKeyMemory
from tinyexperts.layers.product_key_router import RouterWeights
from tinyexperts.layers.sum_of_layers import SumOfLayers
from tinyexperts.ops.activation import Activation
from tinyexperts.ops.cpu.huge_pages import prefer_huge_pages

_LAYER_NORM = f"{nn.LayerNorm.__module__}.{nn.LayerNorm.__qualname__}"
_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}


def from_peer_pytorch(module: nn.Module) -> nn.Module:
    """Make the layer that computes what a PEER of PEER-pytorch 0.2.2 computes.

    Outputs and gradients are equal but for roundings. Weights are copied; dtype, device, training mode, which
    parameters are trained, and tables with sparse gradients are kept. Their options become:

    - `non_competing_scores=True`, their default, retrieves a single expert a head, whatever `num_experts_per_head`
      says, and weights it by the ReLU of its score. So does the result: experts_per_head=1, router_weights="relu". A
      head whose best score is negative adds nothing to the output, and nothing of it is trained by that token. With
      `non_competing_scores=False` it is the softmax of `num_experts_per_head` experts, as in the paper.
    - `heads`, `num_experts`, `dim_key` (Q / 2; by default D / 2) and `activation` (nn.GELU, nn.ReLU or nn.SiLU) have
      their counterparts. Each head has its own sub-keys, and queries are not normalized.
    - `separate_embed_per_head=True`: a SumOfLayers with a PEER of one head for each of theirs.
    - `pre_rmsnorm=True`: an nn.RMSNorm before the layer, equal but for tokens whose norm is about 1e-12. Its gain is
      theirs plus 1, so weight decay pulls it to another value.
    - `product_key_topk` of more than the experts of a head costs them time and changes nothing. With less, retrieval
      is not exact, which is refused.
    - `dropout` must be 0: there is none here.

    The argument train_mem_mask of their forward pass has no counterpart.

    Args:
        module (nn.Module): a PEER_pytorch.PEER. PEERLora, PKAttention and PK have no counterpart; of a ChunkedPEER take
            its `peer`.

    Returns:
        A PEER or a SumOfLayers; with pre_rmsnorm an nn.Sequential of nn.RMSNorm and one of these.

    Raises:
        InputError: a module of another class or version, or an option without a counterpart, by its name.
    """
    attributes = (
        *("keys", "to_queries", "weight_down_embed", "weight_up_embed", "norm", "activation", "score_activation"),
        *("dropout", "heads", "num_experts", "num_experts_per_head_topk", "product_key_topk"),
        "separate_embed_per_head",
    )
    theirs = _checked(module, "PEER_pytorch.PEER.PEER", "PEER-pytorch 0.2.2", attributes)
    _require_no_dropout(theirs, "dropout")
    per_head, num_sub_keys, num_experts = theirs.num_experts_per_head_topk, theirs.keys.shape[1], theirs.num_experts
    if not per_head <= theirs.product_key_topk <= num_sub_keys:
        raise InputError(
            f"product_key_topk must be between the experts retrieved a head, {per_head}, and sqrt(num_experts), "
            f"{num_sub_keys}, got {theirs.product_key_topk}: with less their retrieval is not exact, with more it fails"
        )
    down, up = theirs.weight_down_embed, theirs.weight_up_embed
    _require_equal("sparse", down.sparse, up.sparse)
    _require_equal("requires_grad", down.weight.requires_grad, up.weight.requires_grad)
    if theirs.separate_embed_per_head:
        layer: FeedForward = SumOfLayers(
            _peer(theirs, slice(head, head + 1), slice(head * num_experts, (head + 1) * num_experts))
            for head in range(theirs.heads)
        )
    else:
        layer = _peer(theirs, slice(None), slice(None))
    if not _has(theirs, "norm", "PEER_pytorch.PEER.RMSNorm"):
        return layer.train(module.training)
    # Theirs divides by the root of the sum of squares, at least 1e-12; torch's by that of their mean, plus eps.
    gamma_D = theirs.norm.gamma
    norm = nn.RMSNorm(len(gamma_D), eps=1e-24 / len(gamma_D), device=gamma_D.device, dtype=gamma_D.dtype)
    _fill(norm.weight, gamma_D + 1, like=gamma_D)
    return nn.Sequential(norm, layer).train(module.training)


def from_product_key_memory(module: nn.Module) -> nn.Module:
    """Make the layer that computes what a PKM of product-key-memory 0.3.0 computes.

    Outputs and gradients are equal but for roundings. Weights are copied; dtype, device, training mode, which
    parameters are trained, and values with sparse gradients are kept. Their options become:

    - `heads`, `num_keys` (S; N is its square), `topk` (K) and `dim_head` (Q / 2) have their counterparts. Each head has
      its own sub-keys, and each half of a query is normalized by itself: query_norm="layer_halves".
    - `non_competitive_gates=True`: router_weights="relu" instead of "softmax". All `topk` values stay.
    - `pre_layernorm=True` and `norm_output=True`: an nn.LayerNorm before the layer, and one after it.
    - `use_layernorm` must be True: their batch norm takes the places of a sequence for channels.
    - `concat_values_and_combine` must be False: their values then have dim_head numbers, and no router weights.
    - `differentiable_topk` must be False: coordinate descent is not an exact top-k.
    - `input_dropout`, `query_dropout`, `value_dropout` and `attn_dropout` must be 0: there is none here.

    The arguments mem_trainable_mask and gumbel_noise_scale of their forward pass have no counterpart; input_mask does
    nothing in a layer that can be taken.

    Args:
        module (nn.Module): a product_key_memory.PKM.

    Returns:
        A ProductKeyMemory; with other norms an nn.Sequential of nn.LayerNorm and it.

    Raises:
        InputError: a module of another class or version, or an option without a counterpart, by its name.
    """
    dropouts = ("input_dropout", "query_dropout", "value_dropout", "attn_dropout")
    attributes = (
        *("keys", "to_queries", "values", "norm", "pre_layernorm", "output_norm", "gate_activation", "topk", "heads"),
        *("use_layernorm", "concat_values_and_combine", "differentiable_topk", *dropouts),
    )
    theirs = _checked(module, "product_key_memory.product_key_memory.PKM", "product-key-memory 0.3.0", attributes)
    rules = (
        ("use_layernorm", True, "their batch norm takes the places of a sequence for channels"),
        ("concat_values_and_combine", False, "values of dim_head numbers that are concatenated have no counterpart"),
        ("differentiable_topk", False, "a top-k by coordinate descent has no counterpart"),
    )
    for name, needed, reason in rules:
        if getattr(theirs, name) != needed:
            raise InputError(f"{name} must be {needed}, got {getattr(theirs, name)}: {reason}")
    _require_no_dropout(theirs, *dropouts)
    d_model, num_sub_keys = theirs.to_queries.in_features, theirs.keys.shape[1]
    layer = ProductKeyMemory(
        d_model,
        num_sub_keys**2,
        num_heads=theirs.heads,
        experts_per_head=theirs.topk,
        query_dim=2 * theirs.keys.shape[-1],
        query_norm="layer_halves",
        router_weights=_router_weights(theirs.gate_activation),
        shared_sub_keys=False,
        sparse=theirs.values.sparse,
        device="meta",
        dtype=theirs.keys.dtype,
    )
    _fill_layer(layer, theirs.to_queries.weight, theirs.keys, [theirs.values.weight])
    if not _has(theirs, "norm", _LAYER_NORM):
        raise InputError(f"norm must be {_LAYER_NORM}, got {_path_of(nn.Identity)}")
    _fill_norm(layer.router.norm, theirs.norm)
    before, after = _layer_norm(theirs, "pre_layernorm"), _layer_norm(theirs, "output_norm")
    return (nn.Sequential(*before, layer, *after) if before or after else layer).train(module.training)


def _peer(theirs: Any, heads: slice, rows: slice) -> PEER:
    """Make the layer of some of the heads, over some rows of the tables."""
    down, up = theirs.weight_down_embed, theirs.weight_up_embed
    keys_HS2C = theirs.keys[heads]
    layer = PEER(
        down.embedding_dim,
        theirs.num_experts,
        num_heads=len(keys_HS2C),
        experts_per_head=theirs.num_experts_per_head_topk,
        query_dim=2 * keys_HS2C.shape[-1],
        query_norm="none",
        router_weights=_router_weights(theirs.score_activation),
        activation=_activation(theirs.activation),
        shared_sub_keys=False,
        sparse=down.sparse,
        device="meta",
        dtype=theirs.keys.dtype,
    )
    _fill_layer(layer, theirs.to_queries[0].weight, theirs.keys, [down.weight, up.weight], heads, rows)
    return layer


def _checked(module: nn.Module, path: str, package: str, attributes: tuple[str, ...]) -> Any:
    """Return the module, after a look at its class and at its parameters' dtype and device."""
    if _path_of(type(module)) != path:
        raise InputError(f"module must be a {path} of {package}, and no subclass of it, got {_path_of(type(module))}")
    missing = [name for name in attributes if not hasattr(module, name)]
    if missing:
        raise InputError(f"module must be as {package} makes it, got one without {', '.join(missing)}")
    kinds = {f"{parameter.dtype} on {parameter.device}" for parameter in module.parameters()}
    if len(kinds) > 1:
        raise InputError(f"all parameters must have one dtype and device, got {', '.join(sorted(kinds))}")
    return module


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _has(theirs: Any, name: str, path: str) -> bool:
    """Return True for a norm of a class, False for none."""
    kind = type(getattr(theirs, name))
    if kind is not nn.Identity and _path_of(kind) != path:
        raise InputError(f"{name} must be {path} or none, got {_path_of(kind)}")
    return kind is not nn.Identity


def _require_no_dropout(theirs: Any, *names: str) -> None:
    for name in names:
        if probability := getattr(theirs, name).p:
            raise InputError(
                f"{name} must be 0, got {probability}: there is none here (in evaluation it does nothing; "
                f"module.{name}.p = 0 turns it off)"
            )


def _require_equal(name: str, of_down: bool, of_up: bool) -> None:
    if of_down != of_up:
        raise InputError(
            f"{name} must be the same for weight_down_embed and weight_up_embed, which become one table, got {of_down} "
            f"and {of_up}"
        )


def _activation(theirs: Any) -> Activation:
    if type(theirs) not in _ACTIVATIONS or getattr(theirs, "approximate", "none") != "none":
        raise InputError(f"activation must be nn.GELU (exact), nn.ReLU or nn.SiLU, got {theirs}")
    return _ACTIVATIONS[type(theirs)]


def _router_weights(theirs: Any) -> RouterWeights:
    if type(theirs) is nn.Softmax and theirs.dim == -1:
        return "softmax"
    if type(theirs) is nn.ReLU:
        return "relu"
    raise InputError(f"the function of the scores must be nn.Softmax(dim=-1) or nn.ReLU, got {theirs}")


def _fill(parameter: Tensor, values: Tensor, *, like: Tensor) -> None:
    """Copy values, which a parameter of theirs holds in another order; train ours if theirs is trained."""
    with torch.no_grad():
        parameter.copy_(values)
    parameter.requires_grad_(like.requires_grad)


def _fill_layer(
    layer: ProductKeyLayer,
    query_CD: Tensor,
    keys_HS2C: Tensor,
    tables_ND: list[Tensor],
    heads: slice = slice(None),
    rows: slice = slice(None),
) -> None:
    """Give a layer without memory theirs, of some heads: a query network, sub-keys, and the vectors of experts."""
    layer.to_empty(device=keys_HS2C.device)  # drawing a large table would take long, and random numbers of the caller
    prefer_huge_pages(layer.experts.data)
    # Their rows are (half, head, number), ours (head, half, number).
    query_HQD = query_CD.reshape(2, len(keys_HS2C), -1, query_CD.shape[1]).transpose(0, 1).flatten(1, 2)
    _fill(layer.router.query.weight, query_HQD[heads].flatten(0, 1), like=query_CD)
    _fill(layer.router.sub_keys, keys_HS2C[heads].transpose(1, 2), like=keys_HS2C)
    with torch.no_grad():
        for vector, table_ND in enumerate(tables_ND):
            layer.experts[:, vector].copy_(table_ND[rows])
    layer.experts.requires_grad_(tables_ND[0].requires_grad)


def _fill_norm(norm: Any, theirs: Any) -> None:
    _fill(norm.weight, theirs.weight, like=theirs.weight)
    _fill(norm.bias, theirs.bias, like=theirs.bias)


def _layer_norm(theirs: Any, name: str) -> list[nn.Module]:
    """Return a copy of their layer norm of a name, or nothing where there is none."""
    if not _has(theirs, name, _LAYER_NORM):
        return []
    norm = getattr(theirs, name)
    copied = nn.LayerNorm(norm.normalized_shape, device=norm.weight.device, dtype=norm.weight.dtype)
    _fill_norm(copied, norm)
    return [copied]
