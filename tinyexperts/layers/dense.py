"""The transformer's ordinary feed-forward layer, without biases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers.feed_forward import FeedForward, Flops, ParameterCount, check_mask
from tinyexperts.ops.activation import Activation, activate, check_activation
from tinyexperts.ops.rank_groups import RankGroups


class DenseFFN(FeedForward):
    """y = down(act(up(x))): the twin against which the sparse layers are measured.

    Args:
        d_model (int): width D.
        hidden_dim (int | None): number of hidden neurons; 4 * d_model when None.
        activation (str): "gelu" (exact), "relu", "relu2" or "silu".

    Raises:
        InputError: a width below 1 or an unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        hidden_dim: int | None = None,
        *,
        activation: Activation = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = 4 * d_model if hidden_dim is None else hidden_dim
        if d_model < 1 or hidden_dim < 1:
            raise InputError(f"d_model and hidden_dim must be at least 1, got {d_model} and {hidden_dim}")
        check_activation(activation)
        self.activation = activation
        self.up = nn.Linear(d_model, hidden_dim, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_dim, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw normal weights of variance 1 / fan-in."""
        if self.up.weight.is_meta:
            return
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features), generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (float, [..., D]) -> y (same shape and dtype), each token by itself, whatever the mask."""
        if mask is not None:
            check_mask(mask, x)
        y: Tensor = self.down(activate(self.up(x), self.activation))
        return y

    def flops_per_token(self) -> Flops:
        return Flops(router=0, experts=2 * (self.up.weight.numel() + self.down.weight.numel()))

    def num_parameters(self) -> ParameterCount:
        total = self.up.weight.numel() + self.down.weight.numel()
        return ParameterCount(active=total, total=total)


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """A dense feed-forward layer."""

    kind: ClassVar[str] = "dense"
    """The name of this kind of layer in files."""
    hidden_dim: int | None = None
    """Hidden neurons; default: 4 * d_model."""
    activation: Activation = "gelu"
    """Activation of the hidden neurons."""

    def build(
        self,
        d_model: int,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        ranks: RankGroups | None = None,
    ) -> DenseFFN:
        """Make the layer, which has no table and is the same on all ranks."""
        return DenseFFN(d_model, **vars(self), device=device)
