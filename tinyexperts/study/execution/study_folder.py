"""The folder of a study: what was planned, and what became of it.

study.json    name, scale, data set, evaluation corpora: a folder holds one study
planned/      a file a run: its method, its place in the grid, its configuration
runs/         a folder a run, as `tinyexperts train` makes it, with evaluation-<corpus>.json for each evaluation corpus
logs/         what the runs printed
lock          held by the process that runs the study
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from tinyexperts.errors import InputError
from tinyexperts.study.execution.run_queue import last_metrics
from tinyexperts.study.grids.grid import GridRun
from tinyexperts.training.run_folder import write_whole

State = Literal["waiting", "begun", "done", "failed"]

_PLANNED = TypeAdapter(GridRun)


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What a study folder is about; another study needs another folder."""

    study: str
    scale: str
    data: str
    evaluation_corpora: tuple[str, ...] = ()
    evaluation_tokens: int | None = None
    """Of each evaluation corpus, and of the held-out split; None: all."""

    def corpora(self) -> dict[str, Path]:
        """The evaluation corpora by name."""
        return {Path(path).stem: Path(path) for path in self.evaluation_corpora}


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A planned run and how far it is.

    progress: share of its steps that are done, 0 to 1
    reason: of a failure, in one sentence
    """

    run: GridRun
    state: State
    progress: float
    reason: str | None


class StudyFolder:
    """Reads and writes the folder of a study."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run_path(self, name: str) -> Path:
        return self.path / "runs" / name

    def log_path(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def begin(self, settings: StudySettings) -> None:
        """Write what the study is, or find that it is the same as before.

        Raises:
            InputError: the folder holds another study, or anything else.
        """
        path = self.path / "study.json"
        if path.exists():
            before = self.settings()
            differing = [
                f"{field.name} was {getattr(before, field.name)!r}, is {getattr(settings, field.name)!r}"
                for field in fields(settings)
                if getattr(before, field.name) != getattr(settings, field.name)
            ]
            if differing:
                raise InputError(f"{self.path} holds another study ({'; '.join(differing)}): choose another --output")
            return
        if self.path.exists() and any(entry.name != "lock" for entry in self.path.iterdir()):
            raise InputError(f"{self.path} exists and is not the folder of a study: choose another --output")
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(
            path, json.dumps({field.name: getattr(settings, field.name) for field in fields(settings)}, indent=2)
        )

    def settings(self) -> StudySettings:
        """What the study is.

        Raises:
            InputError: no study there, or one that this version can't read.
        """
        path = self.path / "study.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return StudySettings(**{**content, "evaluation_corpora": tuple(content["evaluation_corpora"])})
        except FileNotFoundError:
            raise InputError(f"{self.path} is not the folder of a study: it has no study.json") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} can't be read: {type(error).__name__}: {error}") from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from running the study meanwhile.

        Raises:
            InputError: another process runs it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process runs the study in {self.path}: let it end, or choose another --output"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def plan(self, runs: list[GridRun]) -> None:
        """Keep the runs of a stage.

        Raises:
            InputError: a run was planned otherwise before (another version made another grid).
        """
        (self.path / "planned").mkdir(exist_ok=True)
        for run in runs:
            placed = replace(run, config=replace(run.config, run=self.run_path(run.name)))
            path = self.path / "planned" / f"{run.name}.json"
            if path.exists():
                if self.planned_run(run.name) != placed:
                    raise InputError(f"{path} was planned with other settings: choose another --output")
                continue
            write_whole(path, _PLANNED.dump_json(placed, indent=2).decode())

    def planned_run(self, name: str) -> GridRun:
        """A run by its name.

        Raises:
            InputError: no such run, or a file that can't be read.
        """
        path = self.path / "planned" / f"{name}.json"
        try:
            return _PLANNED.validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{self.path} plans no run {name}: {path} can't be read ({error.strerror})") from None
        except ValidationError as error:
            raise InputError(f"{path} does not hold a planned run: {error.errors()[0]['msg']}") from None

    def planned_runs(self) -> list[GridRun]:
        """All runs that were planned so far, by name."""
        return [self.planned_run(path.stem) for path in sorted((self.path / "planned").glob("*.json"))]

    def status(self, run: GridRun) -> RunStatus:
        """How far a run is, by its folder; a failure is kept in failed.json until the run is tried again."""
        folder = self.run_path(run.name)
        failure = _read(folder.parent / f"{run.name}.failed.json")
        if failure:
            return RunStatus(run=run, state="failed", progress=self._progress(folder), reason=failure["reason"])
        if not folder.exists():
            return RunStatus(run=run, state="waiting", progress=0.0, reason=None)
        missing = [name for name in self._results(run) if not (folder / name).exists()]
        if not missing:
            damaged = [name for name in ("config.json", "run.json", "metrics.jsonl") if not (folder / name).exists()]
            if damaged:
                reason = f"{folder} has results but no {' and no '.join(damaged)}: delete it, and it is run again"
                return RunStatus(run=run, state="failed", progress=1.0, reason=reason)
            return RunStatus(run=run, state="done", progress=1.0, reason=None)
        return RunStatus(run=run, state="begun", progress=self._progress(folder), reason=None)

    def _results(self, run: GridRun) -> list[str]:
        return ["evaluation.json", *(f"evaluation-{name}.json" for name in self.settings().corpora())]

    def _progress(self, folder: Path) -> float:
        num_steps = (_read(folder / "run.json") or {}).get("num_steps")
        step = last_metrics(folder / "metrics.jsonl").get("train", {}).get("step", 0)
        return step / num_steps if num_steps else 0.0

    def note_failure(self, name: str, reason: str | None) -> None:
        """Keep why a run failed; None: it is tried again."""
        path = self.path / "runs" / f"{name}.failed.json"
        if reason is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps({"reason": reason}))

    def losses(self) -> dict[str, float]:
        """The held-out losses (nats a token) of the runs that are done, by name."""
        found = {}
        for run in self.planned_runs():
            if self.status(run).state == "done":
                loss = (_read(self.run_path(run.name) / "evaluation.json") or {}).get("loss", math.nan)
                found[run.name] = float(loss)
        return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
