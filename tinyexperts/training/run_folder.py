"""The folder of a run: its configuration, its description, its tokenizer, its metrics, its checkpoints.

config.json      the TrainConfig
run.json         command, versions, parameters, FLOPs, and a digest of the data set
lock             held by the process that trains
tokenizer.json   of the data set it was trained on
metrics.jsonl    a line a measurement; the same numbers go to tensorboard/
checkpoints/     step-00000500/ ...
teaching/        of a run that teaches a model: the new data set, own samples, what was known before; taught.json
evaluation.json  results on the held-out split, and expert-usage-<layer>.npy; samples.json: generated text
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tinyexperts.data import TokenDataset, Tokenizer
from tinyexperts.errors import InputError
from tinyexperts.files import exclusive_lock, write_atomically
from tinyexperts.training import config_file
from tinyexperts.training.config import TrainConfig

# The fields that may differ on resume: location and execution, not the experiment. Digests tell whether the content at
# another location is the same.
_MAY_CHANGE = {
    *("run", "data", "teaching.base", "teaching.remember", "teaching.asked", "teaching.old_texts"),
    *("distributed.mesh", "distributed.backend", "distributed.timeout_seconds"),
    "checkpoint.asynchronous",
}


def lock(run: Path) -> AbstractContextManager[None]:
    """Keep other processes from training in the folder meanwhile; make it where it is missing.

    Raises:
        InputError: another process trains in it.
    """
    refusal = f"another process is training in {run}: let it end, or choose another --run"
    return exclusive_lock(run / "lock", refusal)


def check_free(run: Path) -> None:
    """Check that a new run can have a folder for its own.

    Raises:
        InputError: the folder holds a run already, or anything else.
    """
    # config.json is written last: what a kill left before it was no run yet.
    begun = {"lock", "teaching", "tokenizer.json", "run.json", "run.json.partial", "config.json.partial"}
    if run.exists() and (not run.is_dir() or {path.name for path in run.iterdir()} - begun):
        raise InputError(f"the run folder {run} exists: add --resume to go on with it, or choose another --run")


def is_run(run: Path) -> bool:
    """Return True if a run was begun in the folder."""
    return (run / "config.json").is_file()


def create(config: TrainConfig, tokenizer: Tokenizer, description: dict[str, Any]) -> None:
    """Write the first files of a new run into its folder, which the caller holds.

    Args:
        config (TrainConfig): the configuration.
        tokenizer (Tokenizer): the tokenizer of its data.
        description (dict[str, Any]): the content of run.json.

    Raises:
        InputError: the folder has become another run's.
    """
    check_free(config.run)
    tokenizer.save(config.run / "tokenizer.json")
    write_atomically(config.run / "run.json", json.dumps(description, indent=2))
    write_atomically(config.run / "config.json", config_file.to_json(config))


def forget(run: Path, *, with_folder: bool) -> None:
    """Delete the files of a run that made no step; the caller holds its folder.

    Args:
        run (Path): the folder.
        with_folder (bool): delete the folder too, if nothing else is in it.
    """
    for name in ("config.json", "run.json", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints", "lock"):
        for path in (run / name, run / f"{name}.partial"):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if with_folder:
        with suppress(OSError):
            run.rmdir()


def read_config(run: str | os.PathLike[str]) -> TrainConfig:
    """Read the configuration of a run.

    Raises:
        InputError: no run there, or a configuration that this version can't read.
    """
    path = Path(run, "config.json")
    try:
        return config_file.from_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{run} is not the folder of a run: {path.name} can't be read ({error.strerror})") from None
    except InputError as error:
        raise InputError(f"{path} does not hold a configuration: {error}") from None


def check_unchanged(config: TrainConfig) -> None:
    """Check that a resumed run is the run that was begun.

    Raises:
        InputError: names the fields that differ, with both values.
    """
    old, new = read_config(config.run), config
    changes = [f"{name} was {was}, is {now}" for name, was, now in _differences(old, new) if name not in _MAY_CHANGE]
    if changes:
        raise InputError(f"{config.run} can't be resumed with another configuration: {'; '.join(changes)}")


def check_data(run: Path, dataset: TokenDataset, teaching_digest: str | None = None) -> None:
    """Check that a resumed run has the tokens that it was begun with, in whatever folder.

    Args:
        run (Path): the folder of the run.
        dataset (TokenDataset): its data set.
        teaching_digest (str | None): the digest of all that a run that teaches depends on besides.

    Raises:
        InputError: the data set was made by another tokenizer, or holds other tokens; a run that teaches has another
            base, other old texts or teachers; or run.json can't be read.
    """
    check_tokenizer(run, dataset)
    path = run / "run.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        digest = described["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} can't be read: {type(error).__name__}: {error}") from None
    if described.get("teaching_sha256") != teaching_digest:
        raise InputError(
            f"{run} can't be resumed: the base, or what is remembered by or asked, is not what it was begun with"
        )
    if digest != dataset.sha256:
        raise InputError(
            f"{run} can't be resumed with other data: {dataset.folder} holds other tokens than those it was begun with "
            f"(sha256 {dataset.sha256[:12]}, not {digest[:12]})"
        )


def described(run: Path) -> dict[str, Any]:
    """Return a run's description, run.json; empty where there is none.

    Raises:
        InputError: it is damaged.
    """
    return read_record(run / "run.json")


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of one of a run's files of JSON; empty where there is none.

    Raises:
        InputError: it is damaged.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it must hold an object, got {type(content).__name__}")
    return content


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if type(old) is not type(new):
        return [(prefix.rstrip("."), type(old).__name__, type(new).__name__)]
    found = []
    for field in fields(old):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if hasattr(was, "__dataclass_fields__"):
            found += _differences(was, now, f"{prefix}{field.name}.")
        elif was != now:
            found.append((prefix + field.name, was, now))
    return found


def append_sample(run: Path, prompt: str, completion: str) -> None:
    """Add a sample to samples.json.

    Args:
        run (Path): the folder of the run.
        prompt (str): the text that was given.
        completion (str): the text that the model added.

    Raises:
        InputError: the file is there and holds no samples.
    """
    path = run / "samples.json"
    try:
        samples = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise InputError(f"{path} is damaged, the sample is not saved: {error}") from None
    if not isinstance(samples, list):
        raise InputError(f"{path} is damaged, the sample is not saved: it must hold a list")
    write_atomically(path, json.dumps([*samples, {"prompt": prompt, "completion": completion}], indent=2))


def check_tokenizer(run: Path, dataset: TokenDataset) -> None:
    """Check that a data set was made by the tokenizer of the run: a model reads no other tokens.

    Raises:
        InputError: it was made by another one.
    """
    own = Tokenizer.load(run / "tokenizer.json")
    if own.hash != dataset.tokenizer.hash:
        raise InputError(
            f"{dataset.folder} was made by another tokenizer than that of the run {run}: "
            f"sha256 {dataset.tokenizer.hash[:12]} and {own.hash[:12]}"
        )


class Metrics:
    """The writer of metrics.jsonl and of TensorBoard's files; a resumed run continues from its checkpoint."""

    def __init__(self, run: Path, *, after_step: int) -> None:
        """Open the files, and drop what was measured after a step.

        Args:
            run (Path): the folder of the run.
            after_step (int): the step of the checkpoint from which the run continues; 0 for a new run.
        """
        path = run / "metrics.jsonl"
        if path.exists():
            # What was measured before the first step is measured again by a run that starts there.
            kept = [line for line in path.read_text().splitlines(True) if after_step and _step_of(line) <= after_step]
            write_atomically(path, "".join(kept))
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=after_step + 1)
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError:
            self._board.close()
            raise

    def write(self, split: str, step: int, **values: float) -> None:
        """Write the values of one measurement, by their names."""
        self._file.write(json.dumps({"split": split, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        for each in (self._file, self._board):
            with suppress(OSError):  # write() has reported a full disk; the board writes in a thread
                each.close()


def _step_of(line: str) -> float:
    """Return the step of a line; one that a kill cut short belongs to no checkpoint."""
    try:
        step: float = json.loads(line)["step"]
        return step
    except (ValueError, KeyError):
        return float("inf")
