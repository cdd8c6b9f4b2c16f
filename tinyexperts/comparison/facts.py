"""The facts that runs know: questions with their answers, recall by attribute, and the difference to a baseline."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyexperts.comparison.findings import difference_cells, format_interval
from tinyexperts.comparison.frame import HELD_OUT
from tinyexperts.comparison.methods import label_of, look_of
from tinyexperts.comparison.paired import Comparison
from tinyexperts.comparison.results import Results
from tinyexperts.report.numbers import MISSING, fixed, signed
from tinyexperts.report.page import Section
from tinyexperts.report.style import INK, LINE, Drawing, Plot, house_style
from tinyexperts.report.table import Table
from tinyexperts.statistics.seed_interval import SeedInterval

if TYPE_CHECKING:
    import pandas as pd

NATS = "nats, validation"
RECALL = "recall, validation"
MEASURES: Mapping[str, str] = {
    NATS: "nats a fact, known facts",
    HELD_OUT: "nats a token, known facts",
    RECALL: "recall, known facts",
    "nats, unseen-phrasing": "nats a fact, in a phrasing never seen",
    "recall, unseen-phrasing": "recall, in a phrasing never seen",
    "nats, unseen-entities": "nats a fact, entities never seen (the control)",
}
"""The columns of the frame that facts are compared by, in words."""

_ASKED = {
    "validation": "known facts",
    "unseen-phrasing": "known facts, in a phrasing never seen",
    "unseen-entities": "entities never seen (the control)",
}
_ASKED_NOTE = (
    "Known facts are asked in a phrasing that was trained of other facts, and then in one that no training statement "
    "has. Nobody can know the entities that were never seen, of which a value may be guessed. An answer is right if it "
    "is the whole value and nothing else."
)
_ALL = "all facts"
_RIGHT, _WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"


def is_on_facts(comparison: Comparison) -> bool:
    """Return True if both methods were asked for facts with each seed."""
    return bool(comparison.seeds) and not math.isnan(comparison.interval(RECALL).mean)


def facts_opening(runs: Sequence[Results]) -> list[Section]:
    """Return what was asked and answered, and recall by attribute; nothing for runs without facts.

    Args:
        runs (Sequence[Results]): the runs, in the order of the columns.
    """
    if not any(run.evaluated("facts") for run in runs):
        return []
    bars = [recall_bars(runs, split) for split in ("validation", "unseen-phrasing")]
    return [
        _questions(runs),
        Section(
            title="Recall by attribute",
            notes=("A bar is the mean of a method's seeds, a mark on it is a seed.",),
            drawings=tuple(drawing for drawing in bars if drawing is not None),
            tables=(recall_by_attribute(runs),),
        ),
    ]


def _questions(runs: Sequence[Results]) -> Section:
    """Return the questions of the held-out statements, with the answers of each method's first seed."""
    first: dict[str, Results] = {}
    for run in sorted(runs, key=lambda run: run.seed or 0):
        if run.evaluated("facts", "validation", "answers"):
            first.setdefault(run.method, run)
    shown = [first[method] for method in dict.fromkeys(run.method for run in runs) if method in first]
    answers = [{each["question"]: each for each in run.evaluated("facts", "validation", "answers")} for run in shown]
    asked = answers[0] if answers else {}
    rows = [
        (question, each["truth"], *(_marked(of_run.get(question)) for of_run in answers))
        for question, each in asked.items()
    ]
    right = [sum(each["is_right"] for each in of_run.values()) for of_run in answers]
    scores = ", ".join(
        f"{label_of(run.method)} (seed {run.seed}) {number}" for run, number in zip(shown, right, strict=True)
    )
    note = (
        "The first held-out statements of each attribute, in an order that was drawn before training, up to their "
        f"values. The facts were trained, in other phrasings. {_RIGHT} is a right answer, {_WRONG} a wrong one."
    )
    table = Table(
        name="questions",
        title="Questions",
        columns=("Asked", "Truth", *(label_of(run.method) for run in shown)),
        rows=tuple(rows),
        note=f"Right answers of {len(rows)}: {scores}.",
        wraps=True,
    )
    return Section(title="Asked and answered", notes=(note,) if rows else (), tables=(table,))


def _marked(answered: Mapping[str, Any] | None) -> str:
    if answered is None:
        return MISSING
    mark = _RIGHT if answered["is_right"] else _WRONG
    return f"{mark}\N{NO-BREAK SPACE}{answered['answer'] or '(nothing)'}"


def _recalls(runs: Sequence[Results], split: str) -> dict[str, dict[str, list[float]]]:
    """Return the recall of each seed by method and attribute; the first attribute is all of them."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        facts = run.evaluated("facts", split) or {}
        if "all" in facts:
            recalls = {_ALL: facts["all"], **facts.get("by_attribute", {})}
            for attribute, recall in recalls.items():
                found.setdefault(run.method, {}).setdefault(attribute, []).append(recall["recall"])
    return found


@house_style()
def recall_bars(runs: Sequence[Results], split: str) -> Drawing | None:
    """Draw the recall of a split by attribute: a bar for each method, the mean of its seeds, and a mark for each seed.

    Args:
        runs (Sequence[Results]): the runs.
        split (str): the held-out split; None is returned where no run was asked for its facts.
    """
    recalls = _recalls(runs, split)
    if not recalls:
        return None
    attributes = list(dict.fromkeys(attribute for by_attribute in recalls.values() for attribute in by_attribute))
    plot, thickness = Plot("recall, %", ""), 0.8 / len(recalls)
    axes, longest = plot.axes, 1.0
    readings = []
    for number, (method, by_attribute) in enumerate(recalls.items()):
        look = look_of(method)
        heights = [attributes.index(name) + (number - (len(recalls) - 1) / 2) * thickness for name in by_attribute]
        seeds = [[100 * recall for recall in values] for values in by_attribute.values()]
        means = [statistics.fmean(values) for values in seeds]
        axes.barh(heights, means, height=0.88 * thickness, color=look.color, label=look.label)
        for height, values, mean in zip(heights, seeds, means, strict=True):
            plot.marks(values, [height] * len(values), "white", look.marker, 4, markeredgecolor=INK)
            end = max(*values, mean)
            axes.annotate(f"{mean:.0f}", (end, height), (7, 0), textcoords="offset points", va="center", fontsize=9.5)
            longest = max(longest, end)
        readings.append(
            f"{look.label} " + ", ".join(f"{name} {mean:.1f}" for name, mean in zip(by_attribute, means, strict=True))
        )
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_xlim(0, 1.12 * longest)
    axes.set_yticks(range(len(attributes)), [textwrap.fill(name, 16) for name in attributes])
    axes.invert_yaxis()
    axes.figure.legend(loc="outside upper right", ncols=len(recalls), frameon=False)
    caption = f"Recall of {_ASKED[split]}"
    return plot.drawing(f"recall-{split}", caption=caption, text=f"Bar chart: {caption}, %. {'; '.join(readings)}.")


def recall_by_attribute(runs: Sequence[Results]) -> Table:
    """Return the table of recall by attribute, each method's mean over its seeds, with the control."""
    rows: list[tuple[str, str, dict[str, str]]] = []
    colors, attributes = [], [_ALL]
    for split, asked in _ASKED.items():
        for method, by_attribute in _recalls(runs, split).items():
            attributes += [name for name in by_attribute if name not in attributes]
            cells = {name: fixed(100 * statistics.fmean(values), 1) for name, values in by_attribute.items()}
            rows.append((label_of(method), asked, cells))
            colors.append(look_of(method).color)
    return Table(
        name="recall-by-attribute",
        title="Recall by attribute",
        columns=("Method", "Asked", *attributes),
        rows=tuple(
            (method, asked, *(cells.get(each, MISSING) for each in attributes)) for method, asked, cells in rows
        ),
        note=f"Recall in %, means over seeds. {_ASKED_NOTE}",
        colors=tuple(colors),
    )


def measure_names() -> tuple[str, ...]:
    """Return the measures in words with their units, in the order of `measure_means`."""
    return tuple(f"{words}, %" if column.startswith("recall") else words for column, words in MEASURES.items())


def measure_means(runs: pd.DataFrame) -> dict[str, str]:
    """Return the mean of runs by each measure, as a reader sees it; a dash for what was not measured."""
    means = {}
    for column in MEASURES:
        factor, digits = _scale(column)
        mean = factor * runs[column].mean(skipna=False)
        means[column] = MISSING if math.isnan(mean) else fixed(mean, digits)
    return means


def _scale(column: str) -> tuple[float, int]:
    """Return the factor and the decimals by which a measure is shown: shares in percent."""
    return (100.0, 1) if column.startswith("recall") else (1.0, 2)


def measures_table(comparison: Comparison) -> Table:
    """Return the table of a method against the baseline by every measure, with the interval of the difference."""
    method, baseline = label_of(comparison.method), label_of(comparison.baseline)
    theirs, ours = measure_means(comparison.theirs), measure_means(comparison.ours)
    rows = []
    for column, name in zip(MEASURES, measure_names(), strict=True):
        factor, digits = _scale(column)
        difference = comparison.interval(column, factor=factor)
        by_seed = (signed(value, digits) for value in difference.values)
        rows.append((name, theirs[column], ours[column], *by_seed, *difference_cells(difference, digits)))
    return Table(
        name=f"facts-{comparison.method}-against-{comparison.baseline}",
        title=f"Facts: {method} against {baseline}",
        columns=(
            *("Measure", baseline, method, *(f"Difference, seed\N{NO-BREAK SPACE}{seed}" for seed in comparison.seeds)),
            *("mean", "95 % interval"),
        ),
        rows=tuple(rows),
        note=f"Means over the seeds that both have; the difference is {method} minus {baseline}, paired by seed. Fewer "
        "nats and more recall are better. A method that leads on entities never seen has learned something else than "
        "facts.",
    )


def facts_verdict(comparison: Comparison) -> str:
    """Return the recall of known facts by both methods in sentences, and which of them knows more."""
    method, baseline = label_of(comparison.method), label_of(comparison.baseline)
    ours, theirs = (measure_means(runs) for runs in (comparison.ours, comparison.theirs))
    seeds = "with one seed" if len(comparison.seeds) == 1 else f"in the mean of {len(comparison.seeds)} seeds"
    recall, nats = comparison.interval(RECALL, factor=100), comparison.interval(NATS)
    knows = {"higher": f"{method} knows more", "lower": f"{baseline} knows more"}
    is_surer = {"higher": f"{baseline} is surer", "lower": f"{method} is surer"}
    return (
        f"At {comparison.budget}, {method} recalls {ours[RECALL]} % of the known facts and {baseline} "
        f"{theirs[RECALL]} %, {seeds}: {_difference(recall, 1, 'points')}, so "
        f"{knows.get(recall.outcome, _UNDECIDED)}. The true answer costs {method} {ours[NATS]} nats and {baseline} "
        f"{theirs[NATS]}: {_difference(nats, 2, 'nats')}, so {is_surer.get(nats.outcome, _UNDECIDED)}."
    )


_UNDECIDED = "which of the two leads can't be said"


def _difference(difference: SeedInterval, digits: int, unit: str) -> str:
    """Return a difference with its interval, or that it has none."""
    interval = format_interval(difference, digits)
    chance = "one seed has no interval" if interval == MISSING else f"95 % interval {interval}"
    return f"{signed(difference.mean, digits)} {unit} ({chance})"
