"""The groups of ranks that train one model together, as torch.distributed's process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class RankGroups:
    """The ranks that train one model together, as seen from one of them."""

    all_ranks: dist.ProcessGroup
    """All ranks. A batch is made of the tokens of all, equally many of each."""
    column_ranks: dist.ProcessGroup
    """The ranks that share each table by its columns, in the order of the columns."""
    replica_ranks: dist.ProcessGroup | None = None
    """The ranks that hold the same columns, this one among them; None where there is no other."""

    def __deepcopy__(self, memo: dict[int, Any]) -> RankGroups:
        """Return the same groups: they belong to the processes, and can't be copied."""
        return self

    @property
    def num_shards(self) -> int:
        """The number T of parts of a table."""
        return self.column_ranks.size()

    def own_columns(self, width: int) -> slice:
        """Return this rank's part of `width` columns, which T divides."""
        columns, place = width // self.num_shards, dist.get_rank(self.column_ranks)
        return slice(place * columns, (place + 1) * columns)
