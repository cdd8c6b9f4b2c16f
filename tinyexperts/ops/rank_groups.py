"""The groups of ranks that train one model together, as torch.distributed's process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class RankGroups:
    """The ranks that train one model together, as seen from one of them.

    all_ranks: all of them; a batch is made of the tokens of all, equally many of each
    column_ranks: those that share each table by its columns, in the order of the columns
    replica_ranks: those that hold the same columns as this one, itself among them; None where there is no other
    """

    all_ranks: dist.ProcessGroup
    column_ranks: dist.ProcessGroup
    replica_ranks: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RankGroups:
        """Return the same: process groups belong to the processes, and can't be copied."""
        return self

    @property
    def num_shards(self) -> int:
        """T, the parts of a table."""
        return self.column_ranks.size()

    def own_columns(self, width: int) -> slice:
        """This rank's part of `width` columns, which T divides."""
        columns, place = width // self.num_shards, dist.get_rank(self.column_ranks)
        return slice(place * columns, (place + 1) * columns)
