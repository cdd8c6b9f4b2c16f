"""The pairs of a token and an expert, sorted by expert, for devices where a sort is cheap and a wait is not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SortedPairs(NamedTuple):
    """Pairs, sorted stably by their experts."""

    experts: Tensor
    """Their experts (int32, [M*P]), ascending."""
    order: Tensor
    """Their places before (int64, [M*P])."""


def sort_pairs(ids_MP: Tensor) -> SortedPairs:
    """Sort pairs by their experts, which are fewer than 2^31: a radix sort of 4 bytes takes half the passes of 8."""
    return SortedPairs(*ids_MP.flatten().to(torch.int32).sort(stable=True))


def places_of_rows(experts: Tensor) -> Tensor:
    """Return the place of each sorted pair's row among the touched rows (int32, [M*P])."""
    begins = torch.ones_like(experts, dtype=torch.bool)
    torch.ne(experts[1:], experts[:-1], out=begins[1:])
    return begins.cumsum(0, dtype=torch.int32) - 1


def ids_of_pairs(experts: Tensor, order: Tensor, num_retrieved: int) -> Tensor:
    """Return the ids (int64, [M, P]) that `sort_pairs` has sorted."""
    ids = torch.empty_like(order).scatter_(0, order, experts.to(torch.int64))
    return ids.view(-1, num_retrieved)
