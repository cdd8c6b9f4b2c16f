"""Run a study from its plan to its last run: complete runs are skipped, those that were cut off are resumed."""

from __future__ import annotations

import hashlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console

from tinyexperts.data import FileCorpus, TokenDataset, printable
from tinyexperts.data.files import skipped_note
from tinyexperts.errors import InputError, require_at_least
from tinyexperts.study.grid import GridRun, Stage, check_grid, expected_runs
from tinyexperts.study.runner.dry_run import print_plan
from tinyexperts.study.runner.local_queue import ENVIRONMENT, PROGRAM, Command, Job, run_jobs
from tinyexperts.study.runner.status import print_status
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings
from tinyexperts.study.scales import ScaleName, on_facts, scale_named
from tinyexperts.study.studies.lifelong.rounds import check_rounds, prepare_rounds
from tinyexperts.study.study import Study
from tinyexperts.study.study_report import write_study_report
from tinyexperts.training import Interrupted
from tinyexperts.training.config import path_of

# The vocabulary and the entities with facts of a dry run without a data set.
_VOCAB_SIZE_UNTIL_THERE_IS_DATA = 32_000
_NUM_ENTITIES_UNTIL_THERE_IS_DATA = 1_000
_SLURM_HOURS = 24.0


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The size of a study, its data, and how it is run."""

    scale: ScaleName = "laptop"
    """minute (a few steps a run), laptop (two cores, hours), gpu (one of 80 GB), paper (its own settings)."""
    data: Path | None = None
    """Data set of all runs, made by `tinyexperts data prepare`; default: data/stdlib, or data/airports for facts."""
    more_data: tuple[Path, ...] = ()
    """Further data sets of facts. For num-experts: of other numbers of entities, experts by facts. For lifelong: those
    that are taught, one after the other, made with --every-fact and the same tokenizer; learning rates are tuned on the
    first. Without them lifelong takes airports that the data set lacks."""
    output: Path | None = None
    """Folder of the study; default: runs/, its name and its scale."""
    evaluation_corpora: tuple[Path, ...] = ()
    """Files and folders that each model is measured on too; called by their names."""
    evaluation_tokens: int | None = None
    """Tokens of each of them and of the held-out split, in windows spread evenly; default: all there are."""
    executor: Literal["local", "slurm"] = "local"
    """local: processes on this machine; slurm: a job array, by submitit."""
    slurm_partition: str | None = None
    """Partition of the cluster; default: as the cluster chooses."""
    slurm_hours: float | None = None
    """Longest time of one job; default: 24."""
    slurm_gpus: int = 0
    """GPUs that each job asks for: 1, or 0 for none."""
    num_parallel: int = 2
    """Runs side by side: one core each on a CPU."""
    minutes: float | None = None
    """Save and stop after this many minutes; the same command continues."""
    dry_run: bool = False
    """Show every run, its FLOPs, memory and hours, and run nothing."""

    def __post_init__(self) -> None:
        for name in ("evaluation_corpora", "more_data"):
            object.__setattr__(self, name, tuple(path_of(name, path) for path in getattr(self, name)))
        for name in ("data", "output"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, path_of(name, path))
        require_at_least(1, "num_parallel", self.num_parallel)
        if self.slurm_gpus not in (0, 1):
            raise InputError(f"slurm_gpus must be 0 or 1: a run of a study takes one device, got {self.slurm_gpus}")
        for name in ("slurm_partition", "slurm_hours", "slurm_gpus"):
            if self.executor != "slurm" and (value := getattr(self, name)):
                raise InputError(f"{name} is for the executor slurm, got {value} with {self.executor}")
        if self.slurm_hours is not None and not self.slurm_hours > 0:
            raise InputError(f"slurm_hours must be positive, got {self.slurm_hours}")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes must be positive, got {self.minutes}")
        if self.minutes is not None and self.executor == "slurm":
            raise InputError(f"minutes are for runs on this machine, got {self.minutes} with slurm: use slurm_hours")
        require_at_least(1, "evaluation_tokens", self.evaluation_tokens)
        names = [path.stem for path in self.evaluation_corpora]
        if len(set(names)) < len(names):
            raise InputError(f"evaluation corpora must have different names, got {', '.join(names)}")
        missing = [str(path) for path in self.evaluation_corpora if not path.exists()]
        if missing:
            raise InputError(f"there is no evaluation corpus {', '.join(missing)}")


def run_study(study: Study, config: StudyConfig) -> None:
    """Plan, run and finish a study.

    Args:
        study (Study): the study.
        config (StudyConfig): its size, its data, and how it is run.

    Raises:
        InputError: bad input; another process in the same folder; runs that failed, after all others have ended.
        Interrupted: on Ctrl-C and after the minutes that were given, when the runs are saved.
    """
    with TemporaryDirectory() as spare:
        _run_study(study, config, Path(spare))


def _run_study(study: Study, config: StudyConfig, spare: Path) -> None:
    data = config.data or Path("data/airports" if study.is_about_facts else "data/stdlib")
    may_lack_data = config.dry_run and not config.more_data
    dataset = None if may_lack_data and not data.exists() else TokenDataset.open(data)
    num_entities = _NUM_ENTITIES_UNTIL_THERE_IS_DATA if study.is_about_facts and dataset is None else 0
    if dataset is not None and (facts := dataset.split("train").facts) is not None:
        num_entities = len(facts.fact_set.entities)
    has_facts = num_entities > 0
    if study.is_about_facts and not has_facts:
        raise InputError(
            f"the study {study.name} needs a data set of facts, and {printable(data)} is none; "
            "tinyexperts data prepare --corpus airports makes one"
        )
    vocab_size = _VOCAB_SIZE_UNTIL_THERE_IS_DATA if dataset is None else dataset.index.vocab_size
    scale = scale_named(config.scale, data=data, vocab_size=vocab_size)
    scale = on_facts(scale, num_entities) if has_facts else scale
    more = [TokenDataset.open(path) for path in config.more_data]
    folder = StudyFolder(config.output or Path("runs", f"{study.name}-{config.scale}"))
    if study.teaches and dataset is not None:
        if more:
            _check_given_rounds(dataset, more)
        else:
            check_rounds(dataset, scale.teaching)
    elif dataset is not None and more:
        scale = replace(scale, num_entities=_num_entities(study, [dataset, *more]))

    def stages_with(rounds: Path) -> Sequence[Stage]:
        """Return the stages; a study that teaches has its rounds in this folder, where none were given."""
        if not study.teaches or dataset is None:
            return study.stages(scale)
        taught = tuple(other.folder for other in more) or prepare_rounds(rounds, dataset, scale.teaching)
        return study.stages(replace(scale, rounds=taught, runs=folder.path / "runs"))

    if config.dry_run or dataset is None:
        existing = folder.path / "rounds"
        stages = stages_with(existing if existing.exists() else spare)  # a dry run leaves nothing behind
        print_plan(study.name, config.scale, study.question, expected_runs(stages), is_tuned=len(stages) > 1)
        if dataset is None:
            print(f"There is no data set in {data}: a vocabulary of {vocab_size:,} is assumed.")
        return
    num_train_tokens = math.inf if has_facts else dataset.split("train").num_tokens
    if not study.teaches:  # whose rounds are made in its folder
        # Later stages, too: a grid that can't be run is refused before hours are spent.
        check_grid(expected_runs(study.stages(scale)), num_train_tokens)
    corpora_sha256 = {path.stem: _sha256_of_text(path) for path in config.evaluation_corpora}
    with folder.exclusive_lock():
        folder.begin(
            StudySettings(
                study=study.name,
                scale=config.scale,
                data=str(data),
                data_sha256=dataset.sha256,
                more_data=tuple(map(str, config.more_data)),
                more_data_sha256=tuple(other.sha256 for other in more),
                evaluation_corpora=tuple(str(path) for path in config.evaluation_corpora),
                evaluation_sha256=corpora_sha256,
                evaluation_tokens=config.evaluation_tokens,
            )
        )
        run_stages(
            folder, stages_with(folder.path / "rounds"), config, num_train_tokens, show=partial(_show, study, folder)
        )
        failed = [run.name for run in folder.planned_runs() if not folder.has_ended(run)]
        if failed:
            raise InputError(f"{len(failed)} runs failed, {failed[0]} among them; the same command tries them again")


def _check_given_rounds(dataset: TokenDataset, more: Sequence[TokenDataset]) -> None:
    """Refuse data sets that can't be taught: a single one, one without facts or of another tokenizer."""
    if len(more) == 1:
        raise InputError(f"more_data must be two data sets at least, to tune on and to teach, got {len(more)}")
    for other in more:
        if other.split("validation").facts is None:
            raise InputError(f"data sets that are taught must be of facts, and {printable(other.folder)} is none")
        if other.tokenizer.hash != dataset.tokenizer.hash:
            raise InputError(
                f"data sets that are taught must have the tokenizer of {printable(dataset.folder)}, and "
                f"{printable(other.folder)} has another"
            )


def _num_entities(study: Study, datasets: Sequence[TokenDataset]) -> dict[Path, int]:
    """Return the number of entities of each data set that a study compares.

    Raises:
        InputError: the study compares none; no facts, as many entities or another vocabulary than in the first.
    """
    if not study.compares_data:
        raise InputError(
            f"more_data are for num-experts and lifelong, got {printable(datasets[1].folder)} for {study.name}"
        )
    numbers: dict[Path, int] = {}
    for dataset in datasets:
        facts, shown = dataset.split("train").facts, printable(dataset.folder)
        if facts is None:
            raise InputError(f"data sets that are compared must be of facts, and {shown} is none")
        if dataset.index.vocab_size != datasets[0].index.vocab_size:
            raise InputError(
                f"data sets that are compared must have vocabularies of one size: {shown} has "
                f"{dataset.index.vocab_size:,} tokens, {printable(datasets[0].folder)} {datasets[0].index.vocab_size:,}"
            )
        number = len(facts.fact_set.entities)
        if number in numbers.values():
            raise InputError(f"data sets that are compared must differ in entities: {shown} has {number:,} too")
        numbers[dataset.folder] = number
    return numbers


def _show(study: Study, folder: StudyFolder) -> None:
    """Print the state of the study, and write its report where a run is done."""
    print_status(folder)
    if folder.losses():
        command = shlex.join(["tinyexperts", *sys.argv[1:]])
        print(f"Report: {write_study_report(study, folder, command=command)}")


def run_stages(
    folder: StudyFolder, stages: Sequence[Stage], config: StudyConfig, num_train_tokens: float, show: Callable[[], None]
) -> None:
    """Plan and run the stages one after the other, and show the results, also where a stage ends early.

    Args:
        folder (StudyFolder): the folder of the study.
        stages (Sequence[Stage]): the stages.
        config (StudyConfig): how the runs are carried out.
        num_train_tokens (float): tokens of the data set's training split; inf: however often it is repeated.
        show (Callable[[], None]): called at the end to show the results.

    Raises:
        InputError: runs failed that a later stage depends on; another grid.
        Interrupted: on Ctrl-C and after the minutes that were given, when the runs are saved.
    """
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    for number, stage in enumerate(stages):
        runs = folder.stage(number, partial(_checked, stage, num_train_tokens))
        _run_stage(folder, runs, config, deadline, title=f"stage {number + 1} of {len(stages)}: ")
        if time.monotonic() > deadline:
            show()
            raise Interrupted("the minutes are over; what was trained is saved, and the same command continues it")
        statuses = [folder.status_of(run.name) for run in runs]
        failed = [status for status in statuses if status.state != "done"]
        settled = all(status.is_settled for status in statuses) and 2 * len(failed) <= len(runs)
        if not settled and number + 1 < len(stages):
            show()
            raise InputError(
                f"{len(failed)} of {len(runs)} runs of stage {number + 1} failed ({failed[0].name}: "
                f"{failed[0].reason}), and what comes next depends on them; the same command tries them again, and "
                "continues without those that fail again, if they are less than half"
            )
    show()


def _checked(stage: Stage, num_train_tokens: float, losses: Mapping[str, float]) -> list[GridRun]:
    runs = stage(losses)
    check_grid(runs, num_train_tokens)
    return runs


def _sha256_of_text(path: Path) -> str:
    """Return the sha256, in hexadecimal, of the documents of an evaluation corpus.

    Raises:
        InputError: it has no text, or can't be read.
    """
    skipped: list[str] = []
    digest, has_text = hashlib.sha256(), False
    for document in FileCorpus([path]).documents(skipped):
        has_text = has_text or bool(document.text.strip())
        digest.update(document.text.encode() + b"\xff")  # no UTF-8 text has this byte
    if not has_text:
        raise InputError(f"the evaluation corpus {path} has no text{skipped_note(skipped)}")
    return digest.hexdigest()


def _run_stage(folder: StudyFolder, runs: list[GridRun], config: StudyConfig, deadline: float, *, title: str) -> None:
    for is_alone in (False, True):
        open_runs = [run for run in runs if not folder.has_ended(run) and run.is_alone == is_alone]
        if open_runs and time.monotonic() < deadline:
            options = {
                "num_parallel": 1 if is_alone else config.num_parallel,
                "console": Console(stderr=True),
                "title": title,
                "num_done": sum(map(folder.has_ended, runs)),
            }
            _run_side_by_side(folder, open_runs, config, deadline, options)


def _run_side_by_side(
    folder: StudyFolder, runs: list[GridRun], config: StudyConfig, deadline: float, options: dict[str, Any]
) -> None:
    try:
        if config.executor == "slurm":
            from tinyexperts.study.runner.slurm import run_array

            options["timeout_min"] = math.ceil(60 * (config.slurm_hours or _SLURM_HOURS))
            if config.slurm_partition is not None:
                options["slurm_partition"] = config.slurm_partition
            if config.slurm_gpus:
                options["gpus_per_node"] = config.slurm_gpus
            run_array(folder, runs, **options)
        else:
            max_seconds = deadline - time.monotonic()
            jobs = [_job(folder, run.name) for run in runs]
            run_jobs(jobs, environment=ENVIRONMENT, max_seconds=max_seconds, failed=folder.note_failure, **options)
    except KeyboardInterrupt:
        raise Interrupted("stopped; what was trained is saved, and the same command continues it") from None


def _job(folder: StudyFolder, name: str) -> Job:
    command = Command(name="running", arguments=(*PROGRAM, "study", "run", str(folder.path), name))
    return Job(folder=folder.run_path(name), commands=(command,), log=folder.log_path(name))
