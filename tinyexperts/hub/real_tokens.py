"""Which tokens of a padded batch are real, for layers in a decoder of transformers whose tokens depend on each other.

These are layers with query batch norm, and mixtures of experts that choose their tokens.

A block gives its feed-forward layer nothing but the hidden states. Its attention is given the mask, also when a forward
pass is recomputed (gradient checkpointing), and runs before the feed-forward layer: a hook of the one keeps the mask
for a hook of the other. In the mask of causal attention a token sees itself if, and only if, it is real.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tinyexperts.errors import InputError
from tinyexperts.layers import ExpertChoiceMoE, FeedForward, ProductKeyLayer
from tinyexperts.layers.query_batch_norm import QueryBatchNorm


class _RunningBlock(threading.local):  # dynamo traces this, but no ContextVar
    """The attention mask of the block that this thread is in the middle of."""

    attention_mask: Tensor | BlockMask | None = None


_running_block = _RunningBlock()


def tell_of_real_tokens(layer: FeedForward, block: nn.Module) -> None:
    """Let a layer know which tokens are real, in whatever block it is called.

    Args:
        layer (FeedForward): the layer.
        block (Module): the block of a decoder, still with the feed-forward layer that it had.

    Raises:
        InputError: no part of the block is given an attention mask.
    """
    for part in block.children():
        names = list(inspect.signature(part.forward).parameters)
        if "attention_mask" in names:
            part.register_forward_pre_hook(_KeepAttentionMask(names.index("attention_mask")), with_kwargs=True)
            layer.register_forward_pre_hook(_add_mask, with_kwargs=True)
            return
    raise InputError(
        f"{type(layer).__name__} must know which tokens are padding, but no part of {type(block).__name__} is given an "
        "attention_mask: take a layer of which each token is computed by itself (of query norms 'layer' or 'none')"
    )


@dataclass(frozen=True)
class _KeepAttentionMask:
    """The hook of an attention layer, before its forward pass."""

    position: int
    """That of `attention_mask` among the arguments."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_position = args[self.position] if len(args) > self.position else None
        _running_block.attention_mask = kwargs.get("attention_mask", by_position)


def looks_at_other_tokens(layer: nn.Module) -> bool:
    """Return True for a layer whose output for a token may depend on the others of its batch.

    Raises:
        InputError: a module that holds such a layer and can't be given a mask for it.
    """
    inside = [each for each in layer.modules() if _depends_on_batch(each)]
    if inside and not isinstance(layer, FeedForward):
        raise InputError(
            f"a {type(inside[0]).__name__} inside {type(layer).__name__} can't be told which tokens are padding: "
            "return the layer itself, or one that computes each token by itself (of query norms 'layer' or 'none')"
        )
    return bool(inside)


def _depends_on_batch(layer: nn.Module) -> bool:
    if isinstance(layer, ProductKeyLayer):
        return layer.router.query_norm == "batch"
    return isinstance(layer, ExpertChoiceMoE)


def _add_mask(
    layer: FeedForward, args: tuple[Tensor], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor], dict[str, Any]] | None:
    """Add `mask` to the arguments of a layer of which a token is about to depend on the others of the batch."""
    attention_mask, _running_block.attention_mask = _running_block.attention_mask, None
    if attention_mask is None:
        return None
    if isinstance(layer, ProductKeyLayer):
        norm = layer.router.norm
        if not norm.training or (isinstance(norm, QueryBatchNorm) and norm.is_frozen):
            return None
    elif not layer.training:
        return None
    return args, {**kwargs, "mask": real_tokens(attention_mask, args[0])}


def real_tokens(attention_mask: Tensor | BlockMask, x: Tensor) -> Tensor:
    """Return which tokens are real, by the mask that the attention of a block is given in training.

    Args:
        attention_mask (Tensor or BlockMask): [B, T], other than 0 for real tokens (flash attention); [B or 1, heads or
            1, T, T], bool or added to the scores (sdpa, eager); or that of flex attention.
        x (float, [B, T, D]): the tokens.

    Returns:
        real (bool, [B, T]).

    Raises:
        InputError: a mask of other tokens than those of x.
    """
    num_sequences, num_tokens = x.shape[:2]
    if isinstance(attention_mask, BlockMask):
        sequence, token = torch.arange(num_sequences, device=x.device), torch.arange(num_tokens, device=x.device)
        real = attention_mask.mask_mod(sequence[:, None], torch.zeros_like(token), token, token)
        return real.expand(num_sequences, num_tokens)
    tokens = (num_tokens,) if attention_mask.ndim == 2 else (num_tokens, num_tokens)
    if attention_mask.ndim not in (2, 4) or attention_mask.shape[-len(tokens) :] != tokens:
        raise InputError(
            f"in training, the layer must know which of the {num_tokens} tokens are padding, and an attention "
            f"mask of shape {list(attention_mask.shape)} doesn't tell: call model.eval() before generating, or leave "
            "out the cache"
        )
    if attention_mask.ndim == 4:
        attention_mask = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
    if attention_mask.is_floating_point():  # added to the scores: the least number of its type, or minus infinity
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return attention_mask.to(device=x.device, dtype=torch.bool).expand(num_sequences, num_tokens)
