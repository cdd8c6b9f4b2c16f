"""The contract of every feed-forward layer: x[..., D] in, y[..., D] out, and an account of what it costs.

FLOPs are those of the matrix products (2 a multiply-add) of one forward pass; training costs three times as much (the
backward pass multiplies twice for each forward product). Norms, activations and softmax are not counted, as is usual.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs a token of one forward pass: `router` chooses the experts, `experts` is the work of the chosen ones."""

    router: int
    experts: int

    @property
    def total(self) -> int:
        return self.router + self.experts


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Number of parameters: `active` take part in the output of one token, `total` are stored."""

    active: int
    total: int


@dataclass(frozen=True, kw_only=True)
class ParameterGroups:
    """The parameters by the way they are trained: `tables` have one row an expert, of which a step touches few."""

    dense: list[nn.Parameter]
    tables: list[nn.Parameter]


class FeedForward(nn.Module, ABC):
    """A layer that maps x[..., D] to y[..., D], each token alone."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map x (float, [..., D]) -> y (same shape and dtype)."""

    @abstractmethod
    def flops_per_token(self) -> Flops:
        """Count the FLOPs a token of one forward pass."""

    @abstractmethod
    def num_parameters(self) -> ParameterCount:
        """Count the active and total number of parameters, router included."""

    def parameter_groups(self) -> ParameterGroups:
        """Say which parameters are tables; by default none is."""
        return ParameterGroups(dense=list(self.parameters()), tables=[])
