"""Causal self-attention with rotary position embedding and, where asked for, fewer heads of keys and values.

RoPE: Su et al. (arXiv 2104.09864), the halves of a head rotated against each other; grouped-query attention: Ainslie et
al. (arXiv 2305.13245).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyexperts.model.config import TransformerConfig


class LayerCache:
    """Keys and values of one block for the positions seen so far, each [B, key-value heads, context, head width]."""

    def __init__(self, config: TransformerConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch_size, config.key_value_heads, config.context_length, config.d_model // config.num_heads)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def extend(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values from position `start` on; return those of all positions up to their end."""
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = keys, values
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class Positions(NamedTuple):
    """The positions of the tokens of one forward pass, as all blocks need them."""

    start: int
    """The first position."""
    cos: Tensor
    """The cosine of the angle of each position and element (fp32, [T, head width])."""
    sin: Tensor
    """The sine of it, negative for the first half of the elements (fp32, [T, head width])."""
    mask: Tensor | None
    """True where a token attends to a position (bool, [T, start + T]); None: causal, or one token, which sees all."""


def positions_of(config: TransformerConfig, start: int, stop: int, device: torch.device) -> Positions:
    """Return the positions from `start` up to `stop`."""
    half = config.d_model // config.num_heads // 2
    frequencies = config.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    places = torch.arange(stop, device=device)
    angles = places[start:].float().unsqueeze(1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    mask = places <= places[start:].unsqueeze(1) if 0 < start < stop - 1 else None
    return Positions(start=start, cos=torch.cat([cos, cos], dim=1), sin=torch.cat([-sin, sin], dim=1), mask=mask)


def rotate(x: Tensor, positions: Positions) -> Tensor:
    """Rotate the pairs (i, i + half) of each head of x [B, heads, T, head width] by their angles, in fp32."""
    x32 = x.float()
    swapped = x32.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x32 * positions.cos, swapped, positions.sin).to(x.dtype)


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

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Attend to the positions so far.

        Args:
            x (float, [B, T, D]): the hidden states.
            positions (Positions): their positions (`positions_of`).
            cache (LayerCache | None): the keys and values of the positions before; it is extended.

        Returns:
            y (dtype of x, [B, T, D]).
        """
        batch_size, length, d_model = x.shape
        query, key, value = (
            projection(x).view(batch_size, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        query, key = rotate(query, positions), rotate(key, positions)
        if cache is not None:
            key, value = cache.extend(positions.start, key, value)
        y = F.scaled_dot_product_attention(
            *(query, key, value),
            attn_mask=positions.mask,
            is_causal=positions.mask is None and length > 1,
            enable_gqa=self.num_heads != self.key_value_heads,
        )
        projected: Tensor = self.output(y.transpose(1, 2).reshape(batch_size, length, d_model))
        return projected

    def flops_per_token(self, context_length: int) -> int:
        """Count projections, and scores and sums over the whole context (the causal half is not subtracted)."""
        projections = sum(m.weight.numel() for m in (self.query, self.key, self.value, self.output))
        return 2 * projections + 4 * context_length * self.num_heads * self.head_dim
