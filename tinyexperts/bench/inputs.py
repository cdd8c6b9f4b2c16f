"""Random tokens for the layers that are measured."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

# Batches that follow each other, so that the rows of one are no longer in the cache when it comes again.
_MIN_POOL_TOKENS = 2048
_MIN_POOL = 3


class Inputs:
    """Random tokens in turn, each batch [M, D] of standard normal numbers, and a gradient of the output.

    In training the tokens require a gradient, as those of a layer within a model do.

    Args:
        num_tokens (int): tokens of a batch M.
        d_model (int): model width D.
        trains (bool): the layer is trained.
        generator (torch.Generator): the source of randomness.
    """

    def __init__(self, num_tokens: int, d_model: int, *, trains: bool, generator: torch.Generator) -> None:
        self.trains = trains
        self._x_MD = cycle(torch.randn(pool_size(num_tokens), num_tokens, d_model, generator=generator).unbind())
        self.grad_y_MD = torch.randn(num_tokens, d_model, generator=generator)

    def next(self) -> Tensor:
        """Return the next batch."""
        return next(self._x_MD).detach().requires_grad_(self.trains)


def pool_size(num_tokens: int) -> int:
    """Return the number of batches in a pool: odd, so that calls that take turns get each of them."""
    return max(_MIN_POOL, _MIN_POOL_TOKENS // num_tokens + 1 | 1)
