"""The processes of one run: what torchrun started, the mesh that they form, and what they agree on.

Without torchrun a process is the only rank, and none of this costs anything. Under torchrun the ranks form the mesh
(replicate, table): those of a row share each table by its columns, those of a column hold the same columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Store

from tinyexperts.errors import EarlyExit, InputError
from tinyexperts.ops.rank_groups import RankGroups

# How long the ranks that a broken connection stopped wait for each other before they name those that did not notice;
# after a time-out also the twentieth part of it, by which ranks may have begun to wait at different times.
_GRACE_SECONDS = 5.0


class LostRank(EarlyExit):
    """A rank did not answer, or is gone; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, as seen from this one; `groups` and `mesh` are None where it is the only one."""

    rank: int = 0
    size: int = 1
    restarted: bool = False
    """True if an earlier attempt of the same torchrun had begun the run."""
    timeout: timedelta | None = None
    """The time that ranks wait for each other."""
    groups: RankGroups | None = None
    mesh: DeviceMesh | None = None
    store: Store | None = None
    launch: Store | None = None
    """The store of all attempts of one torchrun."""

    @property
    def is_first(self) -> bool:
        """True for the rank that writes what is written once."""
        return self.rank == 0

    def all_gather_scalar(self, value: float) -> list[float]:
        """Gather a number of each rank, in their order; costs less than `all_gather_object`."""
        if self.groups is None:
            return [value]
        values = [torch.zeros((), dtype=torch.float64, device="cpu") for _ in range(self.size)]
        dist.all_gather(values, torch.tensor(value, dtype=torch.float64, device="cpu"), group=self.groups.all_ranks)
        return [each.item() for each in values]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather the values of all ranks, in their order; small ones."""
        values = [value] * self.size
        if self.groups is not None:
            dist.all_gather_object(values, value, group=self.groups.all_ranks)
        return values

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Re-raise one rank's error on all ranks; all must enter, and no exchange between them may be inside.

        Raises:
            InputError: on all, that of the lowest rank that has one or an OSError.
        """
        refusal: InputError | OSError | None = None
        sentence = None
        try:
            yield
        except InputError as error:
            refusal, sentence = error, str(error)
        except OSError as error:
            refusal, sentence = error, f"{error}{f' on rank {self.rank}' if self.size > 1 else ''}"
        sentence = next(filter(None, self.all_gather_object(sentence)), None)
        if sentence is not None:
            raise InputError(sentence) from refusal

    def note_begun(self) -> None:
        """Note that the run has begun: a restart by torchrun resumes it; after a refusal it is refused again."""
        if self.launch is not None:
            self.launch.set("begun", "")

    @contextmanager
    def name_lost_ranks(self) -> Iterator[None]:
        """Turn the failure of an exchange into a LostRank that names the ranks.

        Raises:
            LostRank: an exchange timed out or a connection broke; names the ranks that did not notice.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.store is None or not any(sign in text for sign in ("imed out", "onnection", "Broken pipe")):
                raise
            reason = next(line for line in text.splitlines() if line.strip())
            lost = self._who_is_lost(timed_out="imed out" in text)
            raise LostRank(f"{lost} (rank {self.rank}: {reason})") from error

    def _who_is_lost(self, *, timed_out: bool) -> str:
        """Name lost ranks: each rank that gave up signs; those that have not signed after a while hang or are gone."""
        assert self.store is not None
        assert self.timeout is not None
        lost: list[int] = []
        until = time.monotonic() + max(_GRACE_SECONDS, timed_out * self.timeout.total_seconds() / 20)
        try:
            self.store.set(f"gave up/{self.rank}", "")
            while time.monotonic() < until:
                lost = [rank for rank in range(self.size) if not self.store.check([f"gave up/{rank}"])]
                if not lost:
                    return "the ranks lost each other"
                time.sleep(0.1)
        except RuntimeError:
            return "the process that held the rendezvous is gone"
        return f"{named(lost)} of {self.size} did not answer in time"


def named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


ALONE = Ranks()
