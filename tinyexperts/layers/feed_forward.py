"""The contract of every feed-forward layer: x[..., D] in, y[..., D] out, and a count of its costs.

FLOPs are those of the matrix products (2 a multiply-add) of one forward pass; training costs three times as much (the
backward pass multiplies twice for each forward product). Norms, activations and softmax are not counted, as is usual.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyexperts.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs a token of one forward pass."""

    router: int
    """The choice of the experts."""
    experts: int
    """The work of the chosen experts."""

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.router + self.experts


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Number of parameters."""

    active: int
    """Those that take part in the output of one token."""
    total: int
    """Those that are stored."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroups:
    """The parameters by the way they are trained."""

    dense: list[nn.Parameter]
    """Those that every step changes."""
    tables: list[nn.Parameter]
    """Those with one row an expert, of which a step touches few."""


class FeedForward(nn.Module, ABC):
    """A layer that maps x[..., D] to y[..., D], each token alone."""

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the layer's output for each token.

        Args:
            x (float, [..., D]): the tokens.
            mask (bool, [...]): True for real tokens, False for padding, which changes nothing for real tokens.

        Returns:
            y (dtype of x, [..., D]): the outputs; those of padding mean nothing.
        """

    @abstractmethod
    def flops_per_token(self) -> Flops:
        """Count the FLOPs a token of one forward pass."""

    @abstractmethod
    def num_parameters(self) -> ParameterCount:
        """Count the active and total number of parameters, router included."""

    def parameter_groups(self) -> ParameterGroups:
        """Return the parameters by the way they are trained; by default none is a table."""
        return ParameterGroups(dense=list(self.parameters()), tables=[])


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Check a mask of real tokens.

    Raises:
        InputError: it is not bool, of the leading dimensions of x, on its device.
    """
    if not isinstance(mask, Tensor):
        raise InputError(f"mask must be a bool tensor, True for each real token, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != x.shape[:-1] or mask.device != x.device:
        raise InputError(
            f"mask must be a bool tensor of the leading dimensions of x, True for each real token: bool "
            f"{list(x.shape[:-1])} on {x.device}, got {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)} on "
            f"{mask.device}"
        )
