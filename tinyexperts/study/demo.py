"""The demo: PEER and its dense twin on the standard library's source, at equal training FLOPs, up to a report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tinyexperts.data.prepare import PrepareConfig, prepare
from tinyexperts.data.shards.reader import TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.report.numbers import format_count
from tinyexperts.study.analysis.comparison import compare_methods
from tinyexperts.study.analysis.report import write_report
from tinyexperts.study.analysis.run_results import RunResult, read_run
from tinyexperts.study.runner.local_queue import ENVIRONMENT, PROGRAM, Job, Stage, run_jobs
from tinyexperts.training import Interrupted
from tinyexperts.training.config import path_of

METHODS = ("peer", "dense")
TITLE = "PEER and its dense twin at equal training FLOPs"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo trains and where it writes."""

    output: Path = Path("runs/demo")
    """Folder of the corpus, the runs and report.html."""
    training_flops: float = 2.4e12
    """Training FLOPs of each run, router counted."""
    seeds: tuple[int, ...] = (0, 1)
    """Each method is trained once for each seed."""
    num_parallel: int = 2
    """Runs side by side, one core each."""
    prompts: tuple[str, ...] = ("import os\n\n\ndef ", "class ")
    """What each trained model continues for the report."""
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
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def data(self) -> Path:
        """Folder of the prepared corpus."""
        return self.output / "data"

    @property
    def runs(self) -> tuple[Path, ...]:
        """The run folders as they start: methods in turn, so that both cores end at about the same time."""
        return tuple(self.output / f"{method}-seed{seed}" for seed in self.seeds for method in METHODS)


def run_demo(config: DemoConfig) -> None:
    """Prepare the corpus, train and evaluate every run, write the report, and print what came out.

    What an earlier call with these settings finished is kept, what it began is continued.

    Raises InputError where a run failed, after the others have ended and the report is written; Interrupted on Ctrl-C,
    after the runs are saved.
    """
    console = Console(stderr=True)
    _check_same_settings(config)
    if config.data.exists():
        TokenDataset.open(config.data)
    else:
        prepare(PrepareConfig(output=config.data))
    jobs = [job for folder in config.runs if (job := _job(config, folder)).stages]
    try:
        failures = run_jobs(jobs, num_parallel=config.num_parallel, environment=ENVIRONMENT, console=console)
    except KeyboardInterrupt:
        message = "stopped; what was trained is saved, and the same command again goes on from there"
        raise Interrupted(message) from None
    report = config.output / "report.html"
    folders = sorted(config.runs, key=lambda folder: folder.name)
    write_report(folders, report, command=shlex.join(["tinyexperts", *sys.argv[1:]]), title=TITLE)
    _print_results([read_run(folder) for folder in folders], report)
    if failures:
        raise InputError("; ".join(failures.values()))


def _check_same_settings(config: DemoConfig) -> None:
    """Runs of one report share their budget: another one needs another folder."""
    path = config.output / "demo.json"
    settings = {"training_flops": config.training_flops}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} can't be read ({error}); delete it or choose another --output") from error
        if before != settings:
            raise InputError(
                f"{config.output} was begun with {before}, got {settings}; choose another --output or delete it"
            )
    else:
        config.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")


def _job(config: DemoConfig, folder: Path) -> Job:
    """What is still to be done for a run: nothing where it is trained, evaluated and sampled."""
    stages = []
    if not (folder / "evaluation.json").exists():
        stages.append(Stage(name="training", command=train_command(config, folder)))
        stages.append(Stage(name="evaluating", command=(*PROGRAM, "evaluate", str(folder))))
    sampled = [sample["prompt"] for sample in read_run(folder).samples]
    for prompt in config.prompts:
        if prompt not in sampled:
            stages.append(Stage(name="sampling", command=sample_command(config, folder, prompt)))
    return Job(folder=folder, stages=tuple(stages), log=config.output / "logs" / f"{folder.name}.log")


def train_command(config: DemoConfig, folder: Path) -> tuple[str, ...]:
    """The command that trains a run, or continues it where its folder is there."""
    method, seed = folder.name.split("-seed")
    arguments = [
        *("train", method, "--run", str(folder), "--data", str(config.data), "--seed", seed),
        *("--training-flops", str(config.training_flops), "--threads", "1", "--no-progress"),
        *("--validation-every", "50", "--validation-tokens", "8192"),
    ]
    return (*PROGRAM, *arguments, *(["--resume"] if (folder / "config.json").exists() else []))


def sample_command(config: DemoConfig, folder: Path, prompt: str) -> tuple[str, ...]:
    """The command that continues a prompt by a run's model and keeps the text in the run's folder."""
    length = str(config.max_new_tokens)
    return (*PROGRAM, "generate", str(folder), "--prompt", prompt, "--max-new-tokens", length, "--seed", "0", "--save")


def _print_results(runs: Sequence[RunResult], report: Path) -> None:
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
