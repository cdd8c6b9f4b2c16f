"""The record of a study: its settings, its stages, and the state of each run, without their configurations.

It is read without torch; study_folder.py describes the files.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically
from tinyexperts.training.last_metrics import last_metrics

State = Literal["waiting", "running", "begun", "done", "failed"]
# Words of older folders -> today's.
RENAMED = {"optimiser": "optimizer"}


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The subject of a study folder; another study needs another folder."""

    study: str
    scale: str
    data: str
    evaluation_corpora: tuple[str, ...] = ()
    data_sha256: str | None = None
    """The digest of the data set; None in folders of old."""
    more_data: tuple[str, ...] = ()
    """Further data sets, on each of which the grid is run too."""
    more_data_sha256: tuple[str, ...] = ()
    """The digest of each of them."""
    evaluation_sha256: dict[str, str] | None = None
    """The digest of each evaluation corpus' text, by name; None in folders of old."""
    evaluation_tokens: int | None = None
    """The tokens of each evaluation corpus, and of the held-out split; None: all."""
    runs: str = "runs"
    """The folder of the run folders, in the study's folder."""
    keeps_checkpoints: bool = False
    """The checkpoints of a run stay when it is evaluated."""

    def corpora(self) -> dict[str, Path]:
        """Return the evaluation corpora by name."""
        return {Path(path).stem: Path(path) for path in self.evaluation_corpora}


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A stage as it was planned."""

    runs: list[str]
    """The names of its runs."""
    without: list[str]
    """The names of earlier runs that had failed by then."""


STAGES = TypeAdapter(list[StageRecord])


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """The failure of a run."""

    reason: str
    times: int = 1
    """The number of failures since the run last got further than before."""
    progress: float = 0.0
    diverged: bool = False
    """The run would fail each time."""


_FAILURE = TypeAdapter(_Failure)


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The state of a planned run; "begun" is one that was cut off."""

    name: str
    state: State
    progress: float
    """The share of its steps that are done, 0 to 1."""
    reason: str | None = None
    """The reason of a failure, in one sentence."""
    is_settled: bool = False
    """It is done, or it diverged, or it failed again when it was tried again: later stages do without it."""


class StudyRecord:
    """The folder of a study, with the names of its runs."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def run_path(self, name: str) -> Path:
        """Return the folder of a run."""
        return self._runs / name

    @property
    def _runs(self) -> Path:
        return self.path / self.settings().runs

    def log_path(self, name: str) -> Path:
        """Return the file of a run's output."""
        return self.path / "logs" / f"{name}.log"

    def settings(self) -> StudySettings:
        """Return the settings of the study.

        Raises:
            InputError: no study there, or one that this version can't read.
        """
        path = self.path / "study.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            study = content["study"]
            lists = ("evaluation_corpora", "more_data", "more_data_sha256")
            tuples = {name: tuple(content.get(name, ())) for name in lists}
            return StudySettings(**{**content, **tuples, "study": RENAMED.get(study, study)})
        except FileNotFoundError:
            raise InputError(f"{self.path} is not the folder of a study: it has no study.json") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} can't be read: {type(error).__name__}: {error}") from None

    def stages(self) -> list[StageRecord]:
        """Return the stages that were planned so far.

        Raises:
            InputError: a file that can't be read.
        """
        path = self.path / "stages.json"
        try:
            return STAGES.validate_json(path.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            raise InputError(f"{path} can't be read: {error}") from None

    def planned_names(self) -> list[str]:
        """Return the names of all runs of the stages that were planned so far, sorted."""
        names = {name for stage in self.stages() for name in stage.runs}
        # Files of a stage whose planning was killed don't count; old folders have no stages.json.
        return sorted(names or (path.stem for path in (self.path / "planned").glob("*.json")))

    def status_of(self, name: str) -> RunStatus:
        """Return the state of a run by its folder; a failure is kept in failed.json until the run is done."""
        folder = self.run_path(name)
        if folder.exists() and all((folder / file).exists() for file in self._results()):
            damage = self._damage(folder)
            return RunStatus(
                name=name, state="failed" if damage else "done", progress=1.0, reason=damage, is_settled=not damage
            )
        progress = self._progress(folder)
        if self._is_running(name):
            return RunStatus(name=name, state="running", progress=progress)
        if (folder / "checkpoints").exists() and not (folder / "config.json").exists():
            reason = f"{folder} has checkpoints but no config.json: delete it, and it is run again"
            return RunStatus(name=name, state="failed", progress=0.0, reason=reason)
        failure = self._failure(name)
        if failure is None:
            return RunStatus(name=name, state="begun" if folder.exists() else "waiting", progress=progress)
        is_settled = failure.diverged or failure.times > 1
        return RunStatus(name=name, state="failed", progress=progress, reason=failure.reason, is_settled=is_settled)

    def _damage(self, folder: Path) -> str | None:
        """Return the reason why a run with all results has to be made again; None without one."""
        missing = [file for file in ("config.json", "run.json", "metrics.jsonl") if not (folder / file).exists()]
        if missing:
            return f"{folder} has results but no {' and no '.join(missing)}: delete it, and it is run again"
        broken = [file for file in self._results() if "loss" not in (read_object(folder / file) or {})]
        return f"{folder / broken[0]} can't be read: delete {folder}, and it is run again" if broken else None

    @contextmanager
    def run_lock(self, name: str) -> Iterator[None]:
        """Hold the lock of a run; wait if another process has it, which may have outlived the study that started it."""
        if self._is_running(name):
            print(f"another process is at work on {name}: waiting for it", file=sys.stderr, flush=True)
        self._runs.mkdir(exist_ok=True)
        with self._lock(name):
            yield

    def _is_running(self, name: str) -> bool:
        lock = self._lock(name)
        if not Path(lock.lock_file).exists():
            return False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _lock(self, name: str) -> FileLock:
        return FileLock(self._runs / f"{name}.lock")

    def has_diverged(self, name: str) -> bool:
        """Return True if a run failed in a way in which it would fail again."""
        failure = self._failure(name)
        return failure is not None and failure.diverged

    def _results(self) -> list[str]:
        return ["evaluation.json", *(f"evaluation-{name}.json" for name in self.settings().corpora())]

    def _progress(self, folder: Path) -> float:
        num_steps = (read_object(folder / "run.json") or {}).get("num_steps")
        step = last_metrics(folder / "metrics.jsonl").get("train", {}).get("step", 0)
        return step / num_steps if num_steps else 0.0

    def note_failure(self, name: str, reason: str, *, diverged: bool = False) -> None:
        """Write why a run failed; it is kept until the run is done.

        Args:
            name (str): the name of the run.
            reason (str): the reason in one sentence.
            diverged (bool): it would fail again, and is not tried again.
        """
        before = self._failure(name)
        if before is None or not before.diverged:
            progress = self._progress(self.run_path(name))
            times = 1 if before is None or progress > before.progress else before.times + 1
            failure = _Failure(reason=reason, times=times, progress=progress, diverged=diverged)
            path = self._failure_path(name)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, _FAILURE.dump_json(failure).decode())

    def forget_failure(self, name: str) -> None:
        """Delete the failure of a run that is done."""
        self._failure_path(name).unlink(missing_ok=True)

    def _failure_path(self, name: str) -> Path:
        return self._runs / f"{name}.failed.json"

    def _failure(self, name: str) -> _Failure | None:
        try:
            return _FAILURE.validate_json(self._failure_path(name).read_bytes())
        except (OSError, ValidationError):
            return None


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
