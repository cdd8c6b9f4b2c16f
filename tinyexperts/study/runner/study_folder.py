"""The folder of a study: what was planned, and what became of it.

study.json    name, scale, data set, evaluation corpora: a folder holds one study
planned/      a file a run: its method, its place in the grid, its configuration
stages.json   the runs of each stage that was planned, and which of the stages before had failed by then
runs/         a folder a run, as `tinyexperts train` makes it, with evaluation-<corpus>.json for each evaluation corpus;
              <run>.lock is held by the process that is at work on it, <run>.failed.json says why it failed
logs/         what the runs printed
lock          held by the process that runs the study
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from tinyexperts.errors import InputError
from tinyexperts.files import exclusive_lock, write_atomically
from tinyexperts.study.study import GridRun
from tinyexperts.training.run_folder import last_metrics

State = Literal["waiting", "running", "begun", "done", "failed"]

_PLANNED = TypeAdapter(GridRun)


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What a study folder is about; another study needs another folder."""

    study: str
    scale: str
    data: str
    evaluation_corpora: tuple[str, ...] = ()
    data_sha256: str | None = None
    """Of the data set; None in folders of old."""
    evaluation_sha256: dict[str, str] | None = None
    """Of the text of each evaluation corpus, by name; None in folders of old."""
    evaluation_tokens: int | None = None
    """Of each evaluation corpus, and of the held-out split; None: all."""

    def corpora(self) -> dict[str, Path]:
        """The evaluation corpora by name."""
        return {Path(path).stem: Path(path) for path in self.evaluation_corpora}


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage as it was planned: the names of its runs, and of earlier runs that had failed by then."""

    runs: list[str]
    without: list[str]


_STAGES = TypeAdapter(list[PlannedStage])


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """Why a run failed, how many times it has by now, and whether it would fail each time."""

    reason: str
    times: int = 1
    """Since it last got further than before"""
    progress: float = 0.0
    diverged: bool = False

    @property
    def is_settled(self) -> bool:
        return self.diverged or self.times > 1


_FAILURE = TypeAdapter(_Failure)


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A planned run and how far it is; "begun" is one that was cut off.

    progress: share of its steps that are done, 0 to 1
    reason: of a failure, in one sentence
    is_settled: it is done, or it diverged, or it failed again when it was tried again: later stages do without it
    """

    run: GridRun
    state: State
    progress: float
    reason: str | None
    is_settled: bool


class StudyFolder:
    """Reads and writes the folder of a study."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

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
                and (getattr(before, field.name) is not None or not field.name.endswith("_sha256"))
            ]
            if differing:
                raise InputError(f"{self.path} holds another study ({'; '.join(differing)}): choose another --output")
            return
        if self.path.exists() and any(entry.name != "lock" for entry in self.path.iterdir()):
            raise InputError(f"{self.path} exists and is not the folder of a study: choose another --output")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(
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

    def exclusive_lock(self) -> AbstractContextManager[None]:
        """Keep other processes from running the study meanwhile.

        Raises:
            InputError: another process runs it.
        """
        refusal = f"another process runs the study in {self.path}: let it end, or choose another --output"
        return exclusive_lock(self.path / "lock", refusal)

    def plan(self, runs: list[GridRun]) -> None:
        """Keep the runs of a stage.

        Raises:
            InputError: a run was planned otherwise before and has begun (another version made another grid).
        """
        (self.path / "planned").mkdir(exist_ok=True)
        for run in runs:
            placed = replace(run, config=replace(run.config, run=self.run_path(run.name)))
            path = self.path / "planned" / f"{run.name}.json"
            if path.exists():
                before = self.planned_run(run.name)
                if before == placed:
                    continue
                if self.status(before).state != "waiting":
                    raise InputError(f"{path} was planned with other settings: choose another --output")
            write_atomically(path, _PLANNED.dump_json(placed, indent=2).decode())

    def stages(self) -> list[PlannedStage]:
        """The stages that were planned so far.

        Raises:
            InputError: a file that can't be read.
        """
        path = self.path / "stages.json"
        try:
            return _STAGES.validate_json(path.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            raise InputError(f"{path} can't be read: {error}") from None

    def stage(self, number: int, plan: Callable[[Mapping[str, float]], list[GridRun]]) -> list[GridRun]:
        """The runs of a stage: as they were planned, or, the first time, planned by what is done so far.

        A stage that was planned stays: what a failed run would have changed, had it been tried again before, must not
        change runs that have been made meanwhile. Only the first stage, which no result can change, is planned each
        time: another grid is noticed by it.

        Raises:
            InputError: a run was planned otherwise before and has begun (another version made another grid).
        """
        stages = self.stages()
        if number == 0 and stages:
            runs = plan({})
            if {run.name for run in runs} != set(stages[0].runs):
                raise InputError(f"{self.path} was planned with another grid: choose another --output")
            self.plan(runs)
        if number < len(stages):
            return [self.planned_run(name) for name in stages[number].runs]
        failed = [run.name for run in self.planned_runs() if self.status(run).state == "failed"]
        runs = plan(self.losses())
        self.plan(runs)
        stages.append(PlannedStage(runs=[run.name for run in runs], without=failed))
        write_atomically(self.path / "stages.json", _STAGES.dump_json(stages, indent=2).decode())
        return runs

    def planned_run(self, name: str) -> GridRun:
        """A run by its name.

        Raises:
            InputError: no such run, or a file that can't be read.
        """
        path = self.path / "planned" / f"{name}.json"
        try:
            run = _PLANNED.validate_json(path.read_bytes())
            # Where the folder lies now, though it may have been planned under another name.
            return replace(run, config=replace(run.config, run=self.run_path(name)))
        except OSError as error:
            raise InputError(f"{self.path} plans no run {name}: {path} can't be read ({error.strerror})") from None
        except ValidationError as error:
            raise InputError(f"{path} does not hold a planned run: {error.errors()[0]['msg']}") from None

    def planned_runs(self) -> list[GridRun]:
        """All runs of the stages that were planned so far, by name."""
        names = {name for stage in self.stages() for name in stage.runs}
        # A death may have left files of a stage that was not planned to the end; folders of old have files alone.
        return [self.planned_run(name) for name in sorted(names or self._planned_files())]

    def _planned_files(self) -> list[str]:
        return [path.stem for path in (self.path / "planned").glob("*.json")]

    def status(self, run: GridRun) -> RunStatus:
        """How far a run is, by its folder; a failure is kept in failed.json until the run is done."""
        folder = self.run_path(run.name)
        if folder.exists() and all((folder / name).exists() for name in self._results(run)):
            damaged = [name for name in ("config.json", "run.json", "metrics.jsonl") if not (folder / name).exists()]
            if damaged:
                reason = f"{folder} has results but no {' and no '.join(damaged)}: delete it, and it is run again"
                return RunStatus(run=run, state="failed", progress=1.0, reason=reason, is_settled=False)
            broken = [name for name in self._results(run) if "loss" not in (_read(folder / name) or {})]
            if broken:
                reason = f"{folder / broken[0]} can't be read: delete {folder}, and it is run again"
                return RunStatus(run=run, state="failed", progress=1.0, reason=reason, is_settled=False)
            return RunStatus(run=run, state="done", progress=1.0, reason=None, is_settled=True)
        failure = self._failure(run.name)
        state: State = "begun" if folder.exists() else "waiting"
        if self._is_running(run.name):
            state, failure = "running", None
        elif (folder / "checkpoints").exists() and not (folder / "config.json").exists():
            reason = f"{folder} has checkpoints but no config.json: delete it, and it is run again"
            return RunStatus(run=run, state="failed", progress=0.0, reason=reason, is_settled=False)
        elif failure is not None:
            state = "failed"
        return RunStatus(
            run=run,
            state=state,
            progress=self._progress(folder),
            reason=None if failure is None else failure.reason,
            is_settled=failure is not None and failure.is_settled,
        )

    @contextmanager
    def at_work(self, name: str) -> Iterator[None]:
        """Where a process does what is left of a run; waits for another one that does.

        Such a one may have outlived the study that started it, and does the same.
        """
        if self._is_running(name):
            print(f"another process is at work on {name}: waiting for it", file=sys.stderr, flush=True)
        (self.path / "runs").mkdir(exist_ok=True)
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
        return FileLock(self.path / "runs" / f"{name}.lock")

    def has_ended(self, run: GridRun) -> bool:
        """Whether it is not to be tried again: it is done or has diverged."""
        failure = self._failure(run.name)
        return self.status(run).state == "done" or (failure is not None and failure.diverged)

    def _results(self, run: GridRun) -> list[str]:
        return ["evaluation.json", *(f"evaluation-{name}.json" for name in self.settings().corpora())]

    def _progress(self, folder: Path) -> float:
        num_steps = (_read(folder / "run.json") or {}).get("num_steps")
        step = last_metrics(folder / "metrics.jsonl").get("train", {}).get("step", 0)
        return step / num_steps if num_steps else 0.0

    def note_failure(self, name: str, reason: str, *, diverged: bool = False) -> None:
        """Keep why a run failed, until it is done; one that diverged would do so again, and is not tried again."""
        before = self._failure(name)
        if before is None or not before.diverged:
            progress = self._progress(self.run_path(name))
            times = 1 if before is None or progress > before.progress else before.times + 1
            failure = _Failure(reason=reason, times=times, progress=progress, diverged=diverged)
            path = self._failure_path(name)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, _FAILURE.dump_json(failure).decode())

    def forget_failure(self, name: str) -> None:
        """The run is done."""
        self._failure_path(name).unlink(missing_ok=True)

    def _failure_path(self, name: str) -> Path:
        return self.path / "runs" / f"{name}.failed.json"

    def _failure(self, name: str) -> _Failure | None:
        try:
            return _FAILURE.validate_json(self._failure_path(name).read_bytes())
        except (OSError, ValidationError):
            return None

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
