"""The usage of a product-key layer's experts and its unevenness, as the paper measures them, and Gini's coefficient.

Paper, section 3.3: z'_i is the sum of expert i's router weights over the tokens of a held-out set, z = z' / |z'|_1;
usage is the share of experts with z_i > 0, unevenness the Kullback-Leibler divergence of z from uniform in nats,
log N + sum_i z_i log z_i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyexperts.evaluation.routings import product_key_layers, told_routings
from tinyexperts.layers import Routing


@dataclass(frozen=True, kw_only=True)
class ExpertUsage:
    """The usage of each expert of one layer."""

    share: Tensor
    """z (fp64, [N]), which sums to 1."""

    @property
    def num_experts(self) -> int:
        return len(self.share)

    @property
    def num_dead(self) -> int:
        """Experts without any router weight."""
        return int((self.share == 0).sum())

    @property
    def usage(self) -> float:
        return 1 - self.num_dead / self.num_experts

    @property
    def unevenness(self) -> float:
        """Nats; 0 where all experts are used alike, log N where one is used alone."""
        return math.log(self.num_experts) + float(torch.special.xlogy(self.share, self.share).sum())

    @property
    def gini(self) -> float:
        """0 where all experts are used alike, 1 - 1/N where one is used alone."""
        ranks = torch.arange(1, self.num_experts + 1, dtype=torch.float64, device=self.share.device)
        weighted = float((ranks * self.share.sort().values).sum())
        return (2 * weighted - (self.num_experts + 1)) / self.num_experts


@contextmanager
def recorded_expert_usage(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sum the router weights of every product-key layer while open.

    Args:
        model (nn.Module): the model; its layers are found by their class.

    Yields:
        z' (fp64, [N]) by the layer's name.
    """
    sums = {
        name: torch.zeros(len(layer.experts), dtype=torch.float64, device=layer.experts.device)
        for name, layer in product_key_layers(model).items()
    }

    def add(name: str, _x: Tensor, routing: Routing) -> None:
        sums[name].index_add_(0, routing.ids.flatten(), routing.weights.detach().flatten().double())

    with told_routings(model, add):
        yield sums


def expert_usage(weight_sums: Tensor) -> ExpertUsage:
    """Compute the usage of experts from the sums of their router weights.

    Args:
        weight_sums (fp64, [N]): z'; all zero (ReLU router weights can be) gives shares of 0.
    """
    total = weight_sums.sum()
    return ExpertUsage(share=(weight_sums / total if total > 0 else weight_sums).cpu())
