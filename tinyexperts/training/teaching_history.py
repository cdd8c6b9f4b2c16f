"""The past of a run that was taught: the runs that it comes from, their data, and the memories that they left."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tinyexperts.data import TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.training.checkpoint import checkpoints
from tinyexperts.training.config import MemoryConfig, TrainConfig
from tinyexperts.training.run_folder import check_data, check_tokenizer, described, is_run, read_config
from tinyexperts.training.teaching_start import digest_of_weights

# Names of what a run is asked that no earlier teaching has.
_RESERVED = {"new", "old", "own-samples", "contradicted", ""}


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """A run that a model comes from."""

    run: Path
    config: TrainConfig
    name: str
    """The name of what it was trained on, for readers: `old` of the first run, else the run's."""

    def data(self) -> TokenDataset | None:
        """Return the data set that it was trained on; None where it is gone, or another one has taken its place."""
        try:
            dataset = TokenDataset.open(self.config.data)
            if described(self.run):
                check_data(self.run, dataset, described(self.run).get("teaching_sha256"))
            else:
                check_tokenizer(self.run, dataset)
        except InputError:
            return None
        return dataset

    @property
    def own_samples(self) -> Path:
        """The data set of what its base wrote before it was taught, if it remembered by own samples."""
        return self.run / "teaching" / "own-samples"


def history(run: Path) -> list[PastRun]:
    """Return a run, the one that it was taught from, and so on, as far as they are there.

    Args:
        run (Path): the folder of the run.

    Raises:
        InputError: `run` is no run.
    """
    folders, configs = [run], [read_config(run)]
    while (teaching := configs[-1].teaching) is not None and _is_still(teaching.base, folders[-1]):
        folders.append(teaching.base)
        configs.append(read_config(teaching.base))
    names: list[str] = []
    for number, (folder, config) in enumerate(zip(reversed(folders), reversed(configs), strict=True)):
        is_taken = folder.name in _RESERVED or folder.name in names
        own = f"taught-{number}" if is_taken else folder.name
        names.append("old" if config.teaching is None else own)
    return [
        PastRun(run=folder, config=config, name=name)
        for folder, config, name in zip(folders, configs, reversed(names), strict=True)
    ]


def _is_still(base: Path, taught: Path) -> bool:
    """Return True if a folder holds the run that another was taught from; without weights nothing can be compared."""
    if not is_run(base):
        return False
    known = described(taught).get("base_sha256")
    return not checkpoints(base) or known is None or known == digest_of_weights(base)


def kept_memories(past: list[PastRun]) -> tuple[tuple[MemoryConfig, ...], tuple[str, ...]]:
    """Return the own samples of earlier teachings, oldest first, and a sentence for those that can be kept no more.

    Args:
        past (list[PastRun]): the history of a run.
    """
    memories, remarks = [], []
    for taught, base in reversed(list(pairwise(past))):
        if not taught.own_samples.exists():
            continue
        if checkpoints(base.run):
            memories.append(MemoryConfig(data=taught.own_samples, teacher=base.run))
        else:
            remarks.append(f"{base.run} has no weights any more: {taught.own_samples}, which it wrote, is not kept")
    teaching = past[-1].config.teaching
    if teaching is not None:
        remarks.append(
            f"{teaching.base}, from which {past[-1].run} was taught, is gone or another run by now: what it knew is "
            "neither asked nor gone over"
        )
    elif "base_sha256" in described(past[-1].run):  # imported, or quantized
        remarks.append(
            f"{past[-1].run} comes from a run that was taught, which is not here: what that knew before is neither "
            "asked nor gone over"
        )
    return tuple(memories), tuple(remarks)
