"""The findings of a set of runs: a verdict, figures, tables and samples, and the page that shows them.

All of it is computed from the run folders (results.py); the page names what they lack.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tinyexperts.comparison.facts import facts_opening, facts_verdict, is_on_facts, measures_table
from tinyexperts.comparison.figures import difference_curves, training_curves, usage_histogram
from tinyexperts.comparison.frame import HELD_OUT
from tinyexperts.comparison.methods import label_of
from tinyexperts.comparison.paired import Comparison, compare_methods, first_end
from tinyexperts.comparison.results import Results, read_results
from tinyexperts.errors import InputError
from tinyexperts.report.numbers import MISSING, fixed, format_count, percent, scientific, signed
from tinyexperts.report.page import Finding, Findings, Page, Sample, Section
from tinyexperts.report.style import FALL, Drawing
from tinyexperts.report.table import Table

_USAGE_NOTE = (
    "Over the held-out tokens, each expert collects router weight; its share of the sum is z_i. Usage is the share of "
    "experts with any, unevenness is log N + \N{GREEK CAPITAL LETTER SIGMA} z_i log z_i (0 where all are used alike). "
    "The figures count experts by z_i in units of an even share 1/N."
)


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    command: str,
    title: str = "Runs compared",
    baseline: str = "dense",
    created: datetime | None = None,
) -> None:
    """Write the report of run folders to one HTML file that needs no network.

    Args:
        folders (Sequence[str | PathLike]): run folders named `<method>-seed<k>`, in the order of the tables.
        output (str | PathLike): the HTML file; its folder is made if it isn't there, an earlier report is replaced.
        command (str): the command that makes the report again.
        title (str): the title of the page.
        baseline (str): the method that the others are compared with.
        created (datetime | None): the time shown; None: now.

    Raises:
        InputError: no run is given.
    """
    if not folders:
        raise InputError("a report needs at least one run folder, got none")
    runs = [read_results(folder) for folder in folders]
    found = replace(findings_of(runs, baseline), title=title)
    subtitle = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    page = Page(found=found, subtitle=subtitle, command=command, made_of=_versions(runs), created=created)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page.as_html(), encoding="utf-8")


def findings_of(runs: Sequence[Results], baseline: str) -> Findings:
    """Return the findings of runs: every other method against a baseline, and each run.

    Args:
        runs (Sequence[Results]): the runs.
        baseline (str): the name of the baseline.
    """
    comparisons = compare_methods(runs, baseline)
    nothing = f"Nothing to compare: the report needs runs of {label_of(baseline)} and of another method."
    curves, recall_curves = (
        [training_curves(runs, x, measure) for x in ("training_flops", "num_tokens", "seconds")]
        for measure in ("loss", "recall")
    )
    curves += [difference_curves(comparison) for comparison in comparisons]
    framed = (
        f"Thin lines are seeds, bold ones their mean. The frames are set by the last {percent(1 - FALL, 0)} of each "
        "axis; the first fall from chance runs out of them."
    )
    histograms = [usage_histogram(run, layer) for run in runs for layer in run.expert_usage]
    verdicts = [sentence for comparison in comparisons for sentence in verdicts_on(comparison)]
    opening = facts_opening(runs)
    return Findings(
        opening=opening,
        findings=[Finding(text=text) for text in verdicts or [nothing]],
        doubts=[problem for run in runs for problem in run.problems] + _incomparable(runs),
        sections=[
            *(
                Section(title=table.title, tables=(table,))
                for table in map(measures_table, filter(is_on_facts, comparisons))
            ),
            *(_seed_by_seed(comparison) for comparison in comparisons if comparison.seeds),
            *(
                [Section(title="Recall during training", notes=(framed,), drawings=_drawn(recall_curves))]
                if any(recall_curves)
                else []
            ),
            Section(
                title="Held-out loss during training",
                notes=(framed if any(curves) else "No run recorded two validations, so there is no curve.",),
                drawings=_drawn(curves),
            ),
            Section(title="Runs", tables=(_runs_table(runs),)),
            *_usage_section(runs, _drawn(histograms)),
        ],
        samples=_samples(runs) or (None if opening else {}),
        folded={f"{run.name}: command and configuration": _command_and_config(run) for run in runs},
    )


def verdicts_on(comparison: Comparison) -> list[str]:
    """Return paragraphs about a comparison: the facts that both were asked for, if they were, and the loss."""
    return [*([facts_verdict(comparison)] if is_on_facts(comparison) else []), comparison.verdict]


def _drawn(drawings: Sequence[Drawing | None]) -> tuple[Drawing, ...]:
    return tuple(drawing for drawing in drawings if drawing is not None)


def _seed_by_seed(comparison: Comparison) -> Section:
    method, baseline = label_of(comparison.method), label_of(comparison.baseline)
    title = f"{method} against {baseline}, seed by seed"
    ends = [first_end(*pair) for pair in zip(comparison.ours.results, comparison.theirs.results, strict=True)]
    seconds = [MISSING if end is None else f"{end:.0f}" for end in ends]
    losses = zip(comparison.theirs[HELD_OUT], comparison.ours[HELD_OUT], strict=True)
    pairs = zip(comparison.differences.itertuples(False), comparison.ratios.itertuples(False), strict=True)
    rows = [
        (str(seed), *(fixed(loss, 3) for loss in both), *_cells(*pair, at))
        for seed, both, pair, at in zip(comparison.seeds, losses, pairs, seconds, strict=True)
    ]
    if len(rows) > 1:
        means = _cells(comparison.differences.mean(skipna=False), comparison.ratios.mean(skipna=False), "")
        rows.append(("mean", "", "", *means))
    table = Table(
        name=f"{comparison.method}-against-{comparison.baseline}",
        title=f"{method} against {baseline}",
        columns=(
            *("Seed", f"{baseline} loss", f"{method} loss", "Difference, nats", "on new tokens"),
            *("on tokens whose bigram stood earlier", "Difference when the first ended, nats", "at second"),
            *("Training FLOPs, ratio", "Tokens a second, ratio", "Seconds, ratio"),
        ),
        rows=tuple(rows),
        note=f"Differences are {method} minus {baseline}, ratios {method} divided by {baseline}; below zero, {method} "
        "is better. When the first of the two ended, the other one's learning-rate schedule was unfinished. Seconds "
        "are those of training steps alone.",
        ends_in_mean=len(rows) > 1,
    )
    return Section(title=title, tables=(table,))


def _cells(differences: Any, ratios: Any, at: str) -> tuple[str, ...]:
    ratio_cells = (MISSING if math.isnan(r) else fixed(r, d) for r, d in zip(ratios, (3, 2, 2), strict=True))
    return (*(signed(difference) for difference in differences), at, *ratio_cells)


def _runs_table(runs: Sequence[Results]) -> Table:
    notes = [
        "Active parameters take part in the output of one token: of a table the rows it retrieves, of an untied "
        "embedding one row."
    ]
    evaluated = [run for run in runs if run.evaluation]
    notes += [_held_out(evaluated[0])] if evaluated else []
    notes += [_routing(run) for run in evaluated if run.evaluated("routing")]
    return Table(
        name="compared-runs",
        title="Runs",
        columns=(
            *("Method", "Seed", "Held-out loss, nats", "Perplexity", "Bits a byte", "Loss, new tokens"),
            *(
                "Loss, stood earlier",
                "Active parameters",
                "Total parameters",
                "Weights",
                "Training FLOPs",
                "of it router",
            ),
            *("Training tokens", "Seconds", "Tokens a second"),
        ),
        rows=tuple(
            (
                run.look.label,
                MISSING if run.seed is None else str(run.seed),
                fixed(run.evaluated("loss"), 3),
                fixed(run.evaluated("perplexity"), 2),
                fixed(run.evaluated("bits_per_byte"), 3),
                *(fixed(run.evaluated("loss_by_copy", part), 3) for part in ("new", "stood_earlier")),
                *(format_count(run.parameters(kind)) for kind in ("active", "total")),
                _bytes_of_weights(run),
                scientific(run.last.get("training_flops")),
                percent(run.router_share),
                format_count(run.last.get("num_tokens")),
                fixed(run.last.get("seconds"), 0),
                fixed(run.tokens_per_second, 0),
            )
            for run in runs
        ),
        note="\n".join(notes),
        colors=tuple(run.look.color for run in runs),
    )


def _bytes_of_weights(run: Results) -> str:
    """Return the memory of the weights, which training keeps in fp32."""
    total = run.parameters("total")
    return MISSING if total is None else f"{format_count(4 * total)}B"


def _held_out(run: Results) -> str:
    counts = {name: run.evaluated(name) for name in ("num_documents", "num_tokens", "num_bytes", "context_length")}
    documents, tokens, num_bytes, context = (format_count(count) for count in counts.values())
    known = f"{documents} documents, " if counts["num_documents"] is not None else ""
    sentence = (
        f"Held out: {known}{tokens} tokens, {num_bytes} bytes, none of them in training; {context} tokens of context."
    )
    share = run.evaluated("loss_by_copy", "share_stood_earlier")
    if share is None:
        return sentence
    copied = f"For {percent(share, 0)} of the tokens, the bigram that they end stood earlier in the context"
    return f"{sentence} {copied}, so it could be copied."


def _routing(run: Results) -> str:
    sentence = f"{run.name}: routing in the evaluation above: {run.evaluated('routing')}."
    other = run.evaluated("whole_sequences")
    if not other:
        return sentence
    loss, perplexity = fixed(other.get("loss"), 3), fixed(other.get("perplexity"), 2)
    with_other = f"With the other routing ({other.get('routing')}) its held-out loss is"
    return f"{sentence} {with_other} {loss} nats, perplexity {perplexity}."


def _usage_section(runs: Sequence[Results], histograms: tuple[Drawing, ...]) -> list[Section]:
    layers = [(run, layer) for run in runs for layer in run.expert_usage]
    if not layers:
        return []
    table = Table(
        name="expert-usage",
        title="Expert usage",
        columns=("Method", "Seed", "Layer", "Experts", "Usage", "Unevenness, nats", "Gini", "Unused experts"),
        rows=tuple(
            (
                run.look.label,
                MISSING if run.seed is None else str(run.seed),
                layer.layer,
                fixed(layer.num_experts, 0),
                percent(layer.usage),
                fixed(layer.unevenness, 2),
                fixed(layer.gini, 2),
                fixed(layer.num_dead, 0),
            )
            for run, layer in layers
        ),
        colors=tuple(run.look.color for run, _ in layers),
    )
    return [Section(title="How the experts are used", notes=(_USAGE_NOTE,), drawings=histograms, tables=(table,))]


def _incomparable(runs: Sequence[Results]) -> list[str]:
    """Return a sentence for each thing about the evaluations that makes their losses incomparable."""
    sentences = []
    for key, words in (("num_tokens", "held-out tokens"), ("context_length", "tokens of context")):
        values = {run.name: run.evaluated(key) for run in runs if run.evaluated(key) is not None}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value:,}" for name, value in values.items())
            sentences.append(
                f"The runs were evaluated on different numbers of {words}, so compare with care ({listed})."
            )
    return sentences


def _samples(runs: Sequence[Results]) -> dict[str, tuple[Sample, ...]]:
    by_prompt: dict[str, tuple[Sample, ...]] = {}
    for run in runs:
        label = run.look.label if run.seed is None else f"{run.look.label}, seed {run.seed}"
        for sample in run.samples:
            drawn = Sample(label=label, color=run.look.color, completion=sample["completion"])
            by_prompt[sample["prompt"]] = (*by_prompt.get(sample["prompt"], ()), drawn)
    return by_prompt


def _command_and_config(run: Results) -> tuple[str, str]:
    command = (run.run or {}).get("command", "The command was not recorded.")
    config = "config.json is missing." if run.config is None else json.dumps(run.config, indent=2, ensure_ascii=False)
    return command, config


def _versions(runs: Sequence[Results]) -> str:
    """Return each package's versions over the runs: one where they agree."""
    versions: dict[str, list[str]] = {}
    for run in runs:
        for name, version in ((run.run or {}).get("versions") or {}).items():
            versions.setdefault(name, [])
            versions[name] += [str(version)] if str(version) not in versions[name] else []
    return "; ".join(f"{name} {', '.join(values)}" for name, values in versions.items())
