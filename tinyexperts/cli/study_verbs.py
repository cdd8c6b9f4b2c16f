"""The verbs of studies, reports and benchmarks; each imports what it needs when it is called, and computes nothing.

(No `from __future__ import annotations`: tyro could not find the class of a verb's options by its name.)
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from tinyexperts.errors import InputError


def demo() -> Callable[..., None]:
    """Train PEER and its dense twin at equal training FLOPs on facts about airports, and write a report."""
    from tinyexperts.study.demo import DemoConfig, run_demo

    def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
        run_demo(config)

    return demo


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    output: Path | None = None,
    title: str | None = None,
    baseline: str | None = None,
) -> None:
    """Write a report that compares runs, or the report of a study.

    Folders named <method>-seed<k> count as seeds of a method.

    Args:
        runs: Folders of the runs, or of one study.
        output: The HTML file; default: report.html here, and in a study's folder always.
        title: Its title; default: "Runs compared".
        baseline: The method that the others are compared with; default: dense.
    """
    from tinyexperts.comparison.report import write_report
    from tinyexperts.study.all_studies import study_named
    from tinyexperts.study.runner.study_folder import StudyFolder
    from tinyexperts.study.study_report import write_study_report

    command = shlex.join(["tinyexperts", *sys.argv[1:]])
    studies = [run for run in runs if (run / "study.json").exists()]
    if not studies:
        path = output or Path("report.html")
        write_report(runs, path, command=command, title=title or "Runs compared", baseline=baseline or "dense")
        print(path)
        return
    if len(runs) > 1:
        raise InputError(f"a study's report is of one folder, got {len(runs)}: {' '.join(map(str, runs))}")
    for option, value in (("--output", output), ("--title", title), ("--baseline", baseline)):
        if value is not None:
            raise InputError(f"{option} is for a report of runs, and {runs[0]} is a study, got {value}")
    folder = StudyFolder(runs[0])
    print(write_study_report(study_named(folder.settings().study), folder, command=command))


def study_command(name: str) -> Callable[..., None]:
    """Return the command that runs one of the studies."""
    from tinyexperts.study.all_studies import study_named
    from tinyexperts.study.run_study import StudyConfig, run_study

    def run(config: Annotated[StudyConfig, tyro.conf.arg(name="")] = StudyConfig()) -> None:  # noqa: B008
        run_study(study_named(name), config)

    return run


def study_status(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Show which runs of a study are done, running, begun, waiting or failed, and why.

    Args:
        folder: Folder of the study.
    """
    from tinyexperts.study.runner.status import print_status
    from tinyexperts.study.runner.study_record import StudyRecord

    print_status(StudyRecord(folder))


def run_of_study(folder: Annotated[Path, tyro.conf.Positional], name: Annotated[str, tyro.conf.Positional]) -> None:
    """Train or resume one run of a study, and evaluate it.

    Args:
        folder: Folder of the study.
        name: Name of the run.
    """
    from tinyexperts.study.runner.planned_run import finish_run

    finish_run(folder, name)


def bench_layer() -> Callable[..., None]:
    """Measure PEER on this machine: its operator against the memory's limit, its parts, and its baselines."""
    from tinyexperts import bench

    def bench_layer(config: Annotated[bench.LayerBenchmarkConfig, tyro.conf.arg(name="")]) -> None:
        bench.run_layer_benchmark(config)

    return bench_layer


def bench_tables() -> Callable[..., None]:
    """Measure the experts' forward pass with tables in bf16, int8 and 4 bits against fp32."""
    from tinyexperts import bench

    def bench_tables(config: Annotated[bench.TablesBenchmarkConfig, tyro.conf.arg(name="")]) -> None:
        bench.run_tables_benchmark(config)

    return bench_tables
