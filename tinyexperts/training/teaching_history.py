"""The past of a run that was taught: the runs that it comes from, their data, and the memories that they left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyexperts.data import TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.training.config import MemoryConfig, TrainConfig
from tinyexperts.training.run_folder import check_tokenizer, is_run, read_config


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """A run that a model comes from."""

    run: Path
    config: TrainConfig

    def data(self) -> TokenDataset | None:
        """Return the data set that it was trained on; None where it is gone, or another one has taken its place."""
        try:
            dataset = TokenDataset.open(self.config.data)
            check_tokenizer(self.run, dataset)
        except InputError:
            return None
        return dataset

    @property
    def name(self) -> str:
        """The name of what it was trained on, for readers: `old` of the first run, else the run's."""
        return "old" if self.config.teaching is None else self.run.name


def history(run: Path) -> list[PastRun]:
    """Return a run, the one that it was taught from, and so on, as far as they are there.

    Raises:
        InputError: `run` is no run.
    """
    return [PastRun(run=run, config=read_config(run)), *_before(run)]


def _before(run: Path) -> Iterator[PastRun]:
    teaching = read_config(run).teaching
    while teaching is not None and is_run(teaching.base):
        past = PastRun(run=teaching.base, config=read_config(teaching.base))
        yield past
        teaching = past.config.teaching


def missing_ancestor(past: list[PastRun]) -> Path | None:
    """Return the run that the earliest of a history was taught from, which is gone; None for a whole history."""
    teaching = past[-1].config.teaching
    return None if teaching is None else teaching.base


def kept_memories(run: PastRun) -> tuple[MemoryConfig, ...]:
    """Return the own samples that a run remembered by when it was taught, and of which the writer is still there."""
    remembered = () if run.config.teaching is None else run.config.teaching.remember
    return tuple(
        memory
        for memory in remembered
        if memory.teacher is not None and memory.data.exists() and is_run(memory.teacher)
    )
