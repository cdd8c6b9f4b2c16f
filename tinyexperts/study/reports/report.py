"""The report of a set of runs: one self-contained HTML file with a verdict, figures, tables and samples.

Everything in it is computed from the run folders (see run_results.py); what they lack is said on the page.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from tinyexperts.errors import InputError
from tinyexperts.study.reports.comparison import compare_methods, signed
from tinyexperts.study.reports.figures import (
    LEFT_OUT,
    Drawing,
    difference_curves,
    loss_curves,
    method_color,
    usage_histogram,
)
from tinyexperts.study.reports.run_results import RunResult, method_label, read_run

MISSING = "\N{EN DASH}"
# What HTML forbids even when escaped: lone surrogates, noncharacters, control characters but tab and line feed.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


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


def _drawn(*drawings: Drawing | None) -> list[Drawing]:
    return [drawing for drawing in drawings if drawing is not None]


def template_environment() -> jinja2.Environment:
    """Templates of this folder: everything is escaped, and what HTML forbids replaced."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tinyexperts.study.reports", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters.update(
        fixed=_fixed, count=format_count, scientific=_scientific, percent=_percent, signed=_signed, pretty=_pretty
    )
    environment.globals.update(method_label=method_label, method_color=method_color, MISSING=MISSING)
    return environment


def _printable(value: Any) -> Any:
    """Replace characters that HTML forbids; a model's sample may hold any byte."""
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _fixed(value: float | None, digits: int) -> str:
    """A number with thousands separated and a fixed count of decimals; what isn't finite is named."""
    if value is None:
        return MISSING
    return f"{value:,.{digits}f}" if math.isfinite(value) else "not finite"


def format_count(value: float | None) -> str:
    """A count in short form: 512, 65.5 k, 8.39 M, 1.20 B."""
    if value is None:
        return MISSING
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # The next unit begins where rounding to three digits would show 1,000 of this one.
        if value >= 0.9995 * unit:
            return f"{value / unit:.{max(0, 2 - math.floor(math.log10(value / unit)))}f} {letter}"
    return f"{value:,.0f}"


def _scientific(value: float | None) -> str:
    """Three digits times a power of ten, as in 3.20 × 10¹²."""
    if value is None:
        return MISSING
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} \N{MULTIPLICATION SIGN} 10" + str(int(exponent)).translate(
        str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    )


def _percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def _signed(value: float | None) -> str:
    return MISSING if value is None else signed(value)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


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
