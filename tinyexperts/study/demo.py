"""The demo: PEER and its dense twin on facts about airports, at equal training FLOPs, up to a report."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tinyexperts.comparison.facts import NATS
from tinyexperts.comparison.frame import HELD_OUT, frame_of
from tinyexperts.comparison.methods import method_named
from tinyexperts.comparison.paired import compare_methods
from tinyexperts.comparison.report import findings_of, verdicts_on
from tinyexperts.comparison.results import Results, read_results
from tinyexperts.data.facts.table import AIRPORTS
from tinyexperts.data.prepare import PrepareConfig, prepare
from tinyexperts.data.shards.index import FACT_SPLIT_NAMES
from tinyexperts.errors import InputError, require_at_least
from tinyexperts.report.numbers import format_count
from tinyexperts.report.page import Findings
from tinyexperts.study.analysis.frame import StudyRuns
from tinyexperts.study.analysis.tables import number
from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.run_study import StudyConfig, run_stages
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings
from tinyexperts.study.study import Study
from tinyexperts.study.study_report import write_study_report
from tinyexperts.training.config import path_of, with_settings

# The sizes of the runs: the width of each method, and what both share.
WIDTHS = {"dense": 48, "peer": 48}
NUM_AIRPORTS = 1000
VOCAB_SIZE = 1024
SETTINGS: Mapping[str, Any] = {
    "model.vocab_size": VOCAB_SIZE,
    "model.context_length": 128,
    "batch_size": 8,
    "threads": 1,
    "validation_every": 100,
    "validation_tokens": 8192,
}
_HEAD_DIM = 16
TITLE = "Facts that PEER and its dense twin know at equal training FLOPs"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The runs of the demo, and its folder."""

    output: Path = Path("runs/demo")
    """Folder of the corpus, the runs and report.html."""
    training_flops: float = 2.4e12
    """Training FLOPs of each run, router counted."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each method is trained once for each seed."""
    num_parallel: int = 2
    """Runs at a time, one core each."""

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
        require_at_least(1, "num_parallel", self.num_parallel)

    @property
    def data(self) -> Path:
        """Folder of the prepared corpus."""
        return self.output / "data"


def run_demo(config: DemoConfig) -> None:
    """Prepare the facts, train and evaluate every run, write the report, and print the results.

    Runs that an earlier call with these settings finished are kept, those that it began are continued.

    Args:
        config (DemoConfig): the runs, and the folder.

    Raises:
        InputError: a run failed, after the others have ended and the report is written; a folder of another study.
        MissingExtra: the package of the airports is not installed.
        Interrupted: on Ctrl-C, after the runs are saved.
    """
    folder = StudyFolder(config.output)
    settings = StudySettings(study=DEMO.name, scale="demo", data=str(config.data), runs=".", keeps_checkpoints=True)
    with folder.exclusive_lock():
        folder.begin(settings)
        if not config.data.exists():
            prepare(
                PrepareConfig(
                    output=config.data,
                    corpus=AIRPORTS,
                    max_entities=NUM_AIRPORTS,
                    vocab_size=VOCAB_SIZE,
                )
            )
        execution = StudyConfig(data=config.data, output=config.output, num_parallel=config.num_parallel)
        run_stages(folder, DEMO.stages(config), execution, math.inf, show=partial(_show, folder))
        failed = [
            status.reason for run in folder.planned_runs() if (status := folder.status_of(run.name)).state != "done"
        ]
        if failed:
            raise InputError("; ".join(map(str, failed)))


def _stages(config: DemoConfig) -> tuple[Stage]:
    def train(losses: Mapping[str, float]) -> list[GridRun]:
        # Methods in turn, so that both cores end at about the same time.
        return [_run(config, method, seed) for seed in config.seeds for method in WIDTHS]

    return (train,)


def _run(config: DemoConfig, method: str, seed: int) -> GridRun:
    name, width = f"{method}-seed{seed}", WIDTHS[method]
    settings = with_settings(
        method_named(method).recipe(),
        {
            **SETTINGS,
            "model.d_model": width,
            "model.num_heads": width // _HEAD_DIM,
            "run": config.output / name,
            "data": config.data,
            "training_flops": config.training_flops,
            "seed": seed,
        },
    )
    return GridRun(name=name, method=method, axes={"seed": seed}, config=settings)


def _findings(runs: StudyRuns) -> Findings:
    found = findings_of(list(runs.results.values()), baseline="dense")
    return replace(found, title=TITLE, repeatable=list(runs.results))


DEMO = Study(
    name="demo",
    summary="Train PEER and its dense twin at equal training FLOPs on facts about airports, to a report.",
    question=f"At equal training FLOPs, does PEER know more facts about {NUM_AIRPORTS} airports than its dense twin?",
    stages=_stages,
    is_about_facts=True,
    findings=_findings,
)


def _show(folder: StudyFolder) -> None:
    """Write the report and print the results; nothing where no run is done."""
    done = [folder.run_path(name) for name in folder.losses()]
    if done:
        report = write_study_report(DEMO, folder, command=shlex.join(["tinyexperts", *sys.argv[1:]]))
        _print_results([read_results(path) for path in done], report)


def _print_results(runs: Sequence[Results], report: Path) -> None:
    title = "recall (%) of known facts, in words never seen, of airports never seen; nats a fact; nats a token"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("run", no_wrap=True)
    for heading in ("recall", "new words", "control", "nats", "loss", "parameters", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run, row in zip(runs, frame_of(runs).to_dict("records"), strict=True):
        cells = [
            *(number(100 * row[f"recall, {split}"], ".1f") for split in FACT_SPLIT_NAMES if split != "train"),
            *(number(row[NATS], ".2f"), number(row[HELD_OUT], ".3f")),
            *(format_count(run.parameters("total")), number(row["tokens_per_second"], ",.0f")),
        ]
        table.add_row(run.name, *cells)
    console = Console()
    console.print(table)
    for comparison in compare_methods(runs, "dense"):
        for sentence in verdicts_on(comparison):
            console.print(sentence, highlight=False, markup=False)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)
