"""The demo: PEER and its dense twin on the standard library's source, at equal training FLOPs, up to a report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tinyexperts.comparison.methods import method_named
from tinyexperts.comparison.paired import compare_methods
from tinyexperts.comparison.report import findings_of
from tinyexperts.comparison.results import Results, read_results
from tinyexperts.data.prepare import PrepareConfig, prepare
from tinyexperts.data.shards.reader import TokenDataset
from tinyexperts.errors import InputError, require_at_least
from tinyexperts.report.numbers import format_count
from tinyexperts.report.page import Findings
from tinyexperts.study.analysis.frame import StudyRuns
from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.run_study import StudyConfig, run_stages
from tinyexperts.study.runner.local_queue import ENVIRONMENT, PROGRAM, Command, Job, run_jobs
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings
from tinyexperts.study.study import Study
from tinyexperts.study.study_report import write_study_report
from tinyexperts.training.config import path_of

METHODS = ("peer", "dense")
TITLE = "PEER and its dense twin at equal training FLOPs"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The runs of the demo, and its folder."""

    output: Path = Path("runs/demo")
    """Folder of the corpus, the runs and report.html."""
    training_flops: float = 2.4e12
    """Training FLOPs of each run, router counted."""
    seeds: tuple[int, ...] = (0, 1)
    """Each method is trained once for each seed."""
    num_parallel: int = 2
    """Runs at a time, one core each."""
    prompts: tuple[str, ...] = ("import os\n\n\ndef ", "class ")
    """Texts that each trained model continues for the report."""
    max_new_tokens: int = 64
    """Length of each continuation, in tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", path_of("output", self.output))
        if not self.training_flops > 0:
            raise InputError(f"training_flops must be positive, got {self.training_flops:g}")
        if (
            not self.seeds
            or len(set(self.seeds)) < len(self.seeds)
            or not 0 <= min(self.seeds) <= max(self.seeds) < 2**63
        ):
            raise InputError(f"seeds must be one or more different numbers from 0 to 2^63 - 1, got {self.seeds}")
        for name in ("num_parallel", "max_new_tokens"):
            require_at_least(1, name, getattr(self, name))

    @property
    def data(self) -> Path:
        """Folder of the prepared corpus."""
        return self.output / "data"


def run_demo(config: DemoConfig) -> None:
    """Prepare the corpus, train, evaluate and sample every run, write the report, and print the results.

    Runs that an earlier call with these settings finished are kept, those that it began are continued.

    Args:
        config (DemoConfig): the runs, and the folder.

    Raises:
        InputError: a run failed, after the others have ended and the report is written; a folder of another study.
        Interrupted: on Ctrl-C, after the runs are saved.
    """
    folder = StudyFolder(config.output)
    settings = StudySettings(study=DEMO.name, scale="demo", data=str(config.data), runs=".", keeps_checkpoints=True)
    with folder.exclusive_lock():
        folder.begin(settings)
        if not config.data.exists():
            prepare(PrepareConfig(output=config.data))
        num_train_tokens = TokenDataset.open(config.data).split("train").num_tokens
        execution = StudyConfig(data=config.data, output=config.output, num_parallel=config.num_parallel)
        run_stages(folder, DEMO.stages(config), execution, num_train_tokens, show=partial(_show, folder, config))
        failed = [
            status.reason for run in folder.planned_runs() if (status := folder.status_of(run.name)).state != "done"
        ]
        if failed:
            raise InputError("; ".join(map(str, failed)))


def _stages(config: DemoConfig) -> tuple[Stage]:
    def train(losses: Mapping[str, float]) -> list[GridRun]:
        # Methods in turn, so that both cores end at about the same time.
        return [_run(config, method, seed) for seed in config.seeds for method in METHODS]

    return (train,)


def _run(config: DemoConfig, method: str, seed: int) -> GridRun:
    name = f"{method}-seed{seed}"
    settings = replace(
        method_named(method).recipe(),
        run=config.output / name,
        data=config.data,
        training_flops=config.training_flops,
        seed=seed,
        threads=1,
        validation_every=50,
        validation_tokens=8192,
    )
    return GridRun(name=name, method=method, axes={"seed": seed}, config=settings)


def _findings(runs: StudyRuns) -> Findings:
    found = findings_of(list(runs.results.values()), baseline="dense")
    return replace(found, title=TITLE, repeatable=list(runs.results))


DEMO = Study(
    name="demo",
    summary="Train PEER and its dense twin at equal training FLOPs on this Python's standard library, to a report.",
    question="At equal training FLOPs, does PEER reach a lower loss than its dense twin?",
    stages=_stages,
    findings=_findings,
)


def _show(folder: StudyFolder, config: DemoConfig) -> None:
    """Sample the models, write the report and print the results; nothing where no run is done."""
    done = [folder.run_path(name) for name in folder.losses()]
    if not done:
        return
    jobs = [job for path in done if (job := _sampling(config, path, folder.log_path(path.name))).commands]
    run_jobs(jobs, num_parallel=config.num_parallel, environment=ENVIRONMENT, console=Console(stderr=True))
    report = write_study_report(DEMO, folder, command=shlex.join(["tinyexperts", *sys.argv[1:]]))
    _print_results([read_results(path) for path in done], report)


def _sampling(config: DemoConfig, path: Path, log: Path) -> Job:
    """Return the commands that continue the prompts by a run's model and keep the texts in the run's folder."""
    sampled = [sample["prompt"] for sample in read_results(path).samples]
    options = ("--max-new-tokens", str(config.max_new_tokens), "--seed", "0", "--save")
    commands = [
        Command(name="sampling", arguments=(*PROGRAM, "generate", str(path), "--prompt", prompt, *options))
        for prompt in config.prompts
        if prompt not in sampled
    ]
    return Job(folder=path, commands=tuple(commands), log=log)


def _print_results(runs: Sequence[Results], report: Path) -> None:
    title = "held-out loss in nats a token; active and total parameters"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("run", no_wrap=True)
    for heading in ("loss", "perplexity", "bits/byte", "active", "total", "seconds", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        measured = [
            *((run.evaluated("loss"), ".3f"), (run.evaluated("perplexity"), ".2f")),
            (run.evaluated("bits_per_byte"), ".3f"),
            *((run.last.get("seconds"), ",.0f"), (run.tokens_per_second, ",.0f")),
        ]
        loss, perplexity, bits, *speed = ("-" if value is None else format(value, spec) for value, spec in measured)
        parameters = (format_count(run.parameters(kind)) for kind in ("active", "total"))
        table.add_row(run.name, loss, perplexity, bits, *parameters, *speed)
    console = Console()
    console.print(table)
    for comparison in compare_methods(runs, "dense"):
        console.print(comparison.verdict, highlight=False)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)
