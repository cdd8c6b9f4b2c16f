"""The folder of a study: the planned runs, and the state of each.

study.json    name, scale, data set, evaluation corpora: a folder holds one study
planned/      a file a run: its method, its place in the grid, its configuration
stages.json   the runs of each stage that was planned, and the earlier runs that had failed by then
rounds/       the data sets of facts that a study teaches, where none were given
runs/         a folder a run, as `tinyexperts train` makes it, with evaluation-<corpus>.json for each evaluation corpus;
              <run>.lock is held by the process that works on it, <run>.failed.json says why it failed
logs/         the output of the runs
lock          held by the process that runs the study
"""

from __future__ import annotations

import json
import math
import statistics
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tinyexperts.errors import InputError
from tinyexperts.files import exclusive_lock, write_atomically
from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.runner.study_record import (
    RENAMED,
    STAGES,
    StageRecord,
    StudyRecord,
    StudySettings,
    read_object,
)
from tinyexperts.training import TrainConfig, config_file
from tinyexperts.training.last_metrics import last_metrics

_PLANNED = TypeAdapter(GridRun)


class StudyFolder(StudyRecord):
    """The folder of a study, with the configurations of its runs, to read and to write."""

    def begin(self, settings: StudySettings) -> None:
        """Write the settings of the study, or check that they are the same as before.

        Args:
            settings (StudySettings): the settings.

        Raises:
            InputError: the folder holds another study, or anything else.
        """
        path = self.path / "study.json"
        if path.exists():
            before = asdict(self.settings())
            differing = [
                f"{name} was {before[name]!r}, is {value!r}"
                for name, value in asdict(settings).items()
                if before[name] != value and (before[name] is not None or not name.endswith("_sha256"))
            ]
            if differing:
                raise InputError(f"{self.path} holds another study ({'; '.join(differing)}): choose another --output")
            return
        if self.path.exists() and any(entry.name != "lock" for entry in self.path.iterdir()):
            raise InputError(f"{self.path} exists and is not the folder of a study: choose another --output")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(settings), indent=2))

    def exclusive_lock(self) -> AbstractContextManager[None]:
        """Keep other processes from running the study meanwhile.

        Raises:
            InputError: another process runs it.
        """
        refusal = f"another process runs the study in {self.path}: let it end, or choose another --output"
        return exclusive_lock(self.path / "lock", refusal)

    def write_planned(self, runs: list[GridRun]) -> None:
        """Write the runs of a stage.

        Args:
            runs (list[GridRun]): the runs; the folder of each is replaced by one in the study's folder.

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
                if self.status_of(before.name).state != "waiting":
                    raise InputError(f"{path} was planned with other settings: choose another --output")
            content = {**_PLANNED.dump_python(placed, mode="json"), "config": config_file.to_content(placed.config)}
            write_atomically(path, json.dumps(content, indent=2))

    def stage(self, number: int, plan: Stage) -> list[GridRun]:
        """Return the runs of a stage as they were planned, or plan them by the losses so far.

        A planned stage stays as it is: a failed run that succeeds later must not change runs that were made meanwhile.
        Only the first stage, which no result can change, is planned each time: it shows that the grid is another.

        Args:
            number (int): the number of the stage, from 0.
            plan (Stage): the function that plans it.

        Raises:
            InputError: a run was planned otherwise before and has begun (another version made another grid).
        """
        stages = self.stages()
        if number == 0 and stages:
            runs = plan({})
            if {run.name for run in runs} != set(stages[0].runs):
                raise InputError(f"{self.path} was planned with another grid: choose another --output")
            self.write_planned(runs)
        if number < len(stages):
            return [self.planned_run(name) for name in stages[number].runs]
        failed = [name for name in self.planned_names() if self.status_of(name).state == "failed"]
        runs = plan(self.losses())
        self.write_planned(runs)
        stages.append(StageRecord(runs=[run.name for run in runs], without=failed))
        write_atomically(self.path / "stages.json", STAGES.dump_json(stages, indent=2).decode())
        return runs

    def planned_run(self, name: str) -> GridRun:
        """Return a run by its name.

        Args:
            name (str): the name of the run.

        Raises:
            InputError: no such run, or a file that can't be read.
        """
        path = self.path / "planned" / f"{name}.json"
        try:
            content = json.loads(path.read_bytes())
            config = config_file.from_content(content.get("config"))
            axes = {RENAMED.get(axis, axis): value for axis, value in content.get("axes", {}).items()}
            run = _PLANNED.validate_python({**content, "axes": axes, "config": config})
            # The folder may have been moved since.
            before = run.config.run.parents[len(Path(self.settings().runs).parts)]
            return replace(run, config=replace(_moved(run.config, before, self.path), run=self.run_path(name)))
        except OSError as error:
            raise InputError(f"{self.path} plans no run {name}: {path} can't be read ({error.strerror})") from None
        except ValidationError as error:
            raise InputError(f"{path} does not hold a planned run: {error.errors()[0]['msg']}") from None
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} does not hold a planned run: {error}") from None

    def planned_runs(self) -> list[GridRun]:
        """Return all runs of the stages that were planned so far, in the order of their names."""
        return [self.planned_run(name) for name in self.planned_names()]

    def has_ended(self, run: GridRun) -> bool:
        """Return True if a run is not to be tried again: it is done or has diverged."""
        return self.status_of(run.name).state == "done" or self.has_diverged(run.name)

    def losses(self) -> dict[str, float]:
        """Return the losses of the runs that are done, by name: held-out ones in nats a token.

        Those of a run that taught are nats a fact, the mean of the new facts' and of each data set's that it was asked.
        """
        found = {}
        for name in self.planned_names():
            if self.status_of(name).state == "done":
                found[name] = self._loss(self.run_path(name))
        return found

    def _loss(self, run: Path) -> float:
        measured = last_metrics(run / "metrics.jsonl").get("validation", {})
        of_facts = [value for key, value in measured.items() if key.endswith("nats_per_fact")]
        if len(of_facts) > 1:
            return statistics.fmean(of_facts)
        return float((read_object(run / "evaluation.json") or {}).get("loss", math.nan))


def _moved(config: TrainConfig, before: Path, after: Path) -> TrainConfig:
    """Return a configuration whose paths in one folder are in another."""

    if before == after:
        return config

    def moved(path: Path) -> Path:
        return after / path.relative_to(before) if path.is_relative_to(before) else path

    teaching = config.teaching
    if teaching is not None:
        teaching = replace(
            teaching,
            base=moved(teaching.base),
            remember=tuple(
                replace(memory, data=moved(memory.data), teacher=memory.teacher and moved(memory.teacher))
                for memory in teaching.remember
            ),
            asked={name: moved(path) for name, path in teaching.asked.items()},
            old_texts=tuple(map(moved, teaching.old_texts)),
        )
    return replace(config, data=moved(config.data), teaching=teaching)
