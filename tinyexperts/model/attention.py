"""Causal self-attention with rotary position embedding and, where asked for, fewer heads of keys and values.

RoPE: Su et al. (arXiv 2104.09864), the halves of a head rotated against each other; grouped-query attention: Ainslie et
al. (arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyexperts.model.config import TransformerConfig

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of the queries [B, heads, T, d] and of the keys and values [B, key-value heads, T, d] of the same tokens,
queries and keys rotated; it returns the weighted sums of the values [B, heads, T, d]."""


class RotaryAngles(NamedTuple):
    """The angles of the tokens of one forward pass, as all blocks need them; each [T, d], or [B, 1, T, d]."""

    cos: Tensor
    """The cosine of the angle of each position and element (fp32)."""
    sin: Tensor
    """The sine of it, negative for the first half of the elements (fp32)."""


def rotary_angles(config: TransformerConfig, positions: Tensor) -> RotaryAngles:
    """Return the angles of positions (int64, [T] or [B, 1, T])."""
    half = config.d_model // config.num_heads // 2
    frequencies = config.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return RotaryAngles(cos=torch.cat([cos, cos], dim=-1), sin=torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, angles: RotaryAngles) -> Tensor:
    """Rotate the pairs (i, i + d / 2) of each head of x [B, heads, T, d] by their angles, in fp32."""
    x32 = x.float()
    swapped = x32.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x32 * angles.cos, swapped, angles.sin).to(x.dtype)


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to the tokens up to each one's own: an Attend."""
    return _attend(query, key, value, mask=None, is_causal=query.shape[2] > 1)


class LayerCache:
    """Keys and values of one block for the positions seen so far, each [B, key-value heads, context, d]."""

    def __init__(self, config: TransformerConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch_size, config.key_value_heads, config.context_length, config.d_model // config.num_heads)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def attend_from(self, start: int, mask: Tensor | None) -> Attend:
        """Return the function that attends to the cache and the tokens from position `start` on, which join it.

        Args:
            start (int): the first of their positions.
            mask (Tensor | None): `cache_mask` of these positions.
        """

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            stop = start + key.shape[2]
            self.keys[:, :, start:stop], self.values[:, :, start:stop] = key, value
            keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
            return _attend(query, keys, values, mask=mask, is_causal=mask is None and query.shape[2] > 1)

        return attend


def cache_mask(positions: Tensor, start: int) -> Tensor | None:
    """Return True where a token attends to a position (bool, [T, start + T]); None: causal, or one token, seeing all.

    Args:
        positions (int64, [T]): the positions of the tokens, from `start` on.
        start (int): the number of positions before.
    """
    if start == 0 or len(positions) == 1:
        return None
    return torch.arange(start + len(positions), device=positions.device) <= positions.unsqueeze(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        *(query, key, value), attn_mask=mask, is_causal=is_causal, enable_gqa=query.shape[1] != key.shape[1]
    )


class Attention(nn.Module):
    """Causal self-attention, without biases."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.key_value_heads = config.num_heads, config.key_value_heads
        self.head_dim = config.d_model // config.num_heads
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, self.key_value_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.d_model, self.key_value_heads * self.head_dim, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, angles: RotaryAngles, attend: Attend = attend_causally) -> Tensor:
        """Attend to the positions so far.

        Args:
            x (float, [B, T, D]): the hidden states.
            angles (RotaryAngles): the angles of their positions (`rotary_angles`).
            attend (Attend): the function that attends; another one may keep a cache, or mask padding.

        Returns:
            y (dtype of x, [B, T, D]).
        """
        batch_size, length, d_model = x.shape
        query, key, value = (
            projection(x).view(batch_size, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        y = attend(rotate(query, angles), rotate(key, angles), value)
        projected: Tensor = self.output(y.transpose(1, 2).reshape(batch_size, length, d_model))
        return projected

    def flops_per_token(self, context_length: int) -> int:
        """Count projections, and scores and sums over the whole context (the causal half is not subtracted)."""
        projections = sum(m.weight.numel() for m in (self.query, self.key, self.value, self.output))
        return 2 * projections + 4 * context_length * self.num_heads * self.head_dim
