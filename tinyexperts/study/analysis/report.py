"""The report of a set of runs: one self-contained HTML file with a verdict, figures, tables and samples.

Everything in it is computed from the run folders (see run_results.py); what they lack is said on the page.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jinja2

from tinyexperts.errors import InputError
from tinyexperts.report.page import environment_of
from tinyexperts.report.style import Drawing
from tinyexperts.study.analysis.comparison import compare_methods
from tinyexperts.study.analysis.figures import (
    LEFT_OUT,
    difference_curves,
    loss_curves,
    method_color,
    usage_histogram,
)
from tinyexperts.study.analysis.run_results import RunResult, method_label, read_run


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    command: str,
    title: str = "Runs compared",
    baseline: str = "dense",
    created: datetime | None = None,
) -> None:
    """Write the report of the given run folders to one HTML file that needs no network.

    runs: run folders named `<method>-seed<k>`, in the order in which the tables show them
    output: the HTML file; its folder is made where it isn't there, an earlier report is replaced
    command: what the reader types to make the report again
    baseline: the method that the others are compared with
    created: the time shown; now by default

    Raises InputError where no run is given.
    """
    if not runs:
        raise InputError("a report needs at least one run folder, got none")
    results = [read_run(folder) for folder in runs]
    comparisons = compare_methods(results, baseline)
    page = (
        template_environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            command=command,
            created=(created or datetime.now().astimezone()).isoformat(sep=" ", timespec="minutes"),
            runs=results,
            baseline=baseline,
            comparisons=comparisons,
            curves=_drawn(
                *(loss_curves(results, x) for x in ("training_flops", "num_tokens", "seconds")),
                *(difference_curves(comparison) for comparison in comparisons),
            ),
            framed=1 - LEFT_OUT,
            histograms=_drawn(*(usage_histogram(run, layer) for run in results for layer in run.expert_usage)),
            problems=[problem for run in results for problem in run.problems] + _incomparable(results),
            samples=_samples_by_prompt(results),
            versions=_shared_versions(results),
        )
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def template_environment() -> jinja2.Environment:
    """Return the environment of the reports' templates."""
    environment = environment_of("tinyexperts.study.analysis")
    environment.globals.update(method_label=method_label, method_color=method_color)
    return environment


def _drawn(*drawings: Drawing | None) -> list[Drawing]:
    return [drawing for drawing in drawings if drawing is not None]


def _incomparable(runs: Sequence[RunResult]) -> list[str]:
    """A sentence for each thing about the evaluations that makes their losses incomparable."""
    sentences = []
    for key, words in (("num_tokens", "held-out tokens"), ("context_length", "tokens of context")):
        values = {run.name: run.evaluated(key) for run in runs if run.evaluated(key) is not None}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value:,}" for name, value in values.items())
            sentences.append(
                f"The runs were evaluated on different numbers of {words}, so compare with care ({listed})."
            )
    return sentences


def _samples_by_prompt(runs: Sequence[RunResult]) -> dict[str, list[tuple[RunResult, str]]]:
    by_prompt: dict[str, list[tuple[RunResult, str]]] = {}
    for run in runs:
        for sample in run.samples:
            by_prompt.setdefault(sample["prompt"], []).append((run, sample["completion"]))
    return by_prompt


def _shared_versions(runs: Sequence[RunResult]) -> dict[str, list[str]]:
    """Each package's versions over the runs: one where they agree."""
    versions: dict[str, list[str]] = {}
    for run in runs:
        for name, version in ((run.run or {}).get("versions") or {}).items():
            seen = versions.setdefault(name, [])
            if str(version) not in seen:
                seen.append(str(version))
    return versions
