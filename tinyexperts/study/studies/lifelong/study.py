"""The findings of the lifelong study: what is left of old facts when new ones are taught round by round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tinyexperts.comparison.findings import difference_cells, verdict_on
from tinyexperts.comparison.methods import label_of, look_of
from tinyexperts.report.numbers import MISSING
from tinyexperts.report.page import Finding, Findings, Section
from tinyexperts.report.style import Drawing, HeatMaps, Plot, house_style
from tinyexperts.report.table import Table
from tinyexperts.statistics.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.frame import StudyRuns
from tinyexperts.study.analysis.tables import number
from tinyexperts.study.studies.lifelong.analysis import BASE, LifelongAnalysis, way_of
from tinyexperts.study.studies.lifelong.grid import Way, stages
from tinyexperts.study.study import Study
from tinyexperts.training.config import Remember, Train

_TRAINED: Mapping[Train, str] = {
    "tables": "tables",
    "low-rank": "LoRA",
    "everything": "everything",
}
_REMEMBERED: Mapping[Remember, str] = {"nothing": "nothing", "own-samples": "own samples", "data": "data"}
_UNIT = "points of the old recall"


def _words(way: Way) -> str:
    return f"{_model(way)} ({_trained(way)})"


def _color(way: Way) -> str:
    """Return the color of what is trained in a figure: one of the methods' colors, which the colorblind distinguish."""
    look = {"tables": "peer", "low-rank": "moe", "everything": "dense"}[way.train]
    return look_of("pkm" if way.chooses_rows else look).color


def _trained(way: Way) -> str:
    return "rows by TF-IDF" if way.chooses_rows else _TRAINED[way.train]


def _model(way: Way) -> str:
    experts = "" if way.num_experts is None else f" with {way.num_experts:,} experts"
    return f"{label_of(way.method)}{experts}"


class _Verdicts:
    """The verdicts, each on two ways that differ in one thing."""

    def __init__(self, analysis: LifelongAnalysis) -> None:
        self.analysis = analysis

    def all(self) -> list[Finding]:
        """Return every verdict for which both ways are planned."""
        found: list[Finding] = []
        of_peer = [way for way in self.analysis.ways if way.method == "peer" and way.num_experts is None]
        for way in of_peer:
            if way.chooses_rows:
                found += self._at_equal_learning(way, replace(way, chooses_rows=False))
            elif way.train == "tables":
                found += self._at_equal_learning(way, replace(way, train="everything"))
                found += self._at_equal_learning(way, replace(way, train="low-rank"))
        for remember in _REMEMBERED:
            for method in ("dense", "moe", "pkm"):
                ours = Way(method="peer", train="tables", remember=remember)
                theirs = replace(ours, method=method, train="tables" if method == "pkm" else "everything")
                claim = f"{_words(ours)} forgets less than {_words(theirs)}, remembering {_REMEMBERED[remember]}"
                found += self._after_all_rounds(claim, ours, theirs)
        for way in of_peer:
            if way.remember == "own-samples" and not way.chooses_rows:
                claim = f"{_words(way)} forgets less remembering own samples than remembering data"
                found += self._after_all_rounds(claim, way, replace(way, remember="data"))
        for remember in ("own-samples", "data"):
            tables = [way for way in self.analysis.num_experts if (way.train, way.remember) == ("tables", remember)]
            tables.sort(key=lambda way: self.analysis.num_experts[way])
            if len(tables) > 1:
                most, least = (f"{self.analysis.num_experts[way]:,}" for way in (tables[-1], tables[0]))
                claim = f"{most} experts forget less than {least} (tables), remembering {_REMEMBERED[remember]}"
                found += self._after_all_rounds(claim, tables[-1], tables[0])
        return found

    def _at_equal_learning(self, way: Way, other: Way) -> list[Finding]:
        claim = (
            f"At equal learning {_words(way)} forgets less than {_words(other)}, remembering "
            f"{_REMEMBERED[way.remember]}, in the first round"
        )
        return self._verdict(claim, way, other, self.analysis.forgotten_at_equal_learning(way, other), number=1)

    def _after_all_rounds(self, claim: str, way: Way, other: Way) -> list[Finding]:
        difference = paired_difference(self.analysis.forgotten(way), self.analysis.forgotten(other))
        number = self.analysis.num_rounds
        return self._verdict(f"After {number} rounds {claim}", way, other, difference, number=number)

    def _verdict(
        self, claim: str, way: Way, other: Way, difference: SeedInterval | None, *, number: int
    ) -> list[Finding]:
        if not {way, other} <= set(self.analysis.ways):
            return []
        is_finished = self.analysis.is_finished(way, other, number=number)
        return [
            verdict_on(
                claim, difference, is_finished=is_finished, unit=_UNIT, digits=1, words=("holds", "does not hold")
            )
        ]


def _rounds_table(analysis: LifelongAnalysis) -> Table:
    """Return the table of recall after the last round, by way."""
    rows = []
    for way in analysis.ways:
        before, after = analysis.mean_recalls(way, 0), analysis.mean_recalls(way, analysis.num_rounds)
        lost = analysis.forgotten(way)
        low, high = SeedInterval(values=tuple(lost.values())).bounds if lost else (math.nan, math.nan)
        rows.append(
            (
                *(_model(way), _trained(way), _REMEMBERED[way.remember], f"{analysis.learning_rates[way]:.2g}"),
                number(_percent(before, BASE), ".1f"),
                number(_percent(after, BASE), ".1f"),
                *(number(_percent(after, str(each)), ".1f") for each in range(1, analysis.num_rounds + 1)),
                number(statistics.fmean(lost.values()) if lost else None, ".1f"),
                f"{low:.1f} to {high:.1f}" if math.isfinite(low) else MISSING,
                str(len(lost)),
            )
        )
    return Table(
        name="rounds",
        title=f"Recall after {analysis.num_rounds} rounds, %",
        columns=(
            *("model", "trained", "remembered by", "learning rate", "old facts before", "old facts after"),
            *(f"round {each}" for each in range(1, analysis.num_rounds + 1)),
            *("lost of the old, %", "95 % interval", "seeds"),
        ),
        rows=tuple(rows),
        note="Held-out wordings of the facts of each round, and held-out statements of the base's, after the last "
        "round; means over seeds. Learning rates were tuned for each way on a round of its own, which is not judged.",
    )


def _equal_learning_table(analysis: LifelongAnalysis) -> Table:
    """Return the table of what ways forget at equal learning, each against PEER's tables remembering as it does."""
    rows = []
    for way in analysis.ways:
        reference = Way(method="peer", train="tables", remember=way.remember)
        if way == reference or reference not in analysis.ways:
            continue
        cells = difference_cells(analysis.forgotten_at_equal_learning(way, reference), 1)
        rows.append((_model(way), _trained(way), _REMEMBERED[way.remember], *cells))
    return Table(
        name="equal-learning",
        title="Forgotten at equal learning, against PEER's tables",
        columns=("model", "trained", "remembered by", f"more forgotten, {_UNIT}", "95 % interval"),
        rows=tuple(rows),
        note="After the pass of the first round at which both had learned as many of the new facts, between two passes "
        "on a straight line. More is worse than PEER's tables.",
    )


def _cost_table(analysis: LifelongAnalysis) -> Table:
    """Return the table of what a round takes, against the training of the base."""
    rows = []
    for way in analysis.ways:
        cost = analysis.cost(way)
        rows.append(
            (
                *(_model(way), _trained(way), _REMEMBERED[way.remember]),
                number(cost["passes"], ".1f"),
                number(cost["seconds"], ",.0f"),
                number(cost["flops"], ".2e"),
                number(cost["base_seconds"], ",.0f"),
                number(cost["base_flops"], ".2e"),
                number(100 * cost["flops"] / cost["base_flops"], ".1f"),
            )
        )
    return Table(
        name="costs",
        title="Costs of a round",
        columns=(
            *("model", "trained", "remembered by", "passes", "seconds", "FLOPs"),
            *("seconds of the base's training", "FLOPs of the base's training", "FLOPs of a round, % of the base's"),
        ),
        rows=tuple(rows),
        note="To train anew on old and new facts takes the base's training at least. Own samples that are drawn count. "
        "Where rows are chosen, the passes that count what old texts retrieve are not in it. Other runs went on beside "
        "these, so that seconds are rough.",
    )


def _triangles_table(analysis: LifelongAnalysis) -> Table:
    """Return the table of recall of everything after each round."""
    names = (BASE, *(str(each) for each in range(1, analysis.num_rounds + 1)))
    rows = []
    for way in analysis.ways:
        for after in range(analysis.num_rounds + 1):
            recalls = analysis.mean_recalls(way, after)
            cells = (number(_percent(recalls, name), ".1f") for name in names)
            rows.append((_model(way), _trained(way), _REMEMBERED[way.remember], str(after), *cells))
    return Table(
        name="triangles",
        title="Recall after each round, %",
        columns=("model", "trained", "remembered by", "after round", "old facts", *(f"round {n}" for n in names[1:])),
        rows=tuple(rows),
        is_folded=True,
    )


def _percent(recalls: dict[str, float], name: str) -> float | None:
    return None if name not in recalls else 100 * recalls[name]


@house_style()
def _triangles(analysis: LifelongAnalysis, model: Sequence[Way]) -> Drawing | None:
    """Draw the recall of each round's facts after each round: a heat map for each way to teach a model."""
    names = (BASE, *(str(each) for each in range(1, analysis.num_rounds + 1)))
    maps = {}
    for way in model:
        values = np.full((analysis.num_rounds + 1, len(names)), np.nan)
        for after in range(analysis.num_rounds + 1):
            for name, recall in analysis.mean_recalls(way, after).items():
                values[after, names.index(name)] = 100 * recall
        if np.isfinite(values).any():
            maps[f"{_trained(way)}, {_REMEMBERED[way.remember]}"] = values
    if not maps:
        return None
    drawn = HeatMaps(
        maps,
        x_label="facts of round",
        y_label="after round",
        x_names=("old", *names[1:]),
        y_names=tuple(str(after) for after in range(analysis.num_rounds + 1)),
        columns=len(_REMEMBERED),
    )
    label = _model(model[0])
    return drawn.drawing(
        f"triangles-{model[0].model}",
        caption=f"{label}: recall of each round's facts after each round, %",
        text=f"Heat maps of recall, %, {label}: rows are rounds that were taught, columns the facts of each round.",
    )


@house_style()
def _kept_against_learned(analysis: LifelongAnalysis, model: Sequence[Way]) -> Drawing | None:
    """Draw what is kept against what is learned, pass by pass, in the first round."""
    plot = Plot("recall of the new facts, %", "kept of the old recall, %")
    styles = {"nothing": ":", "own-samples": "-", "data": "--"}
    drawn = []
    for way in model:
        curves = [curve for seed in analysis.seeds if (curve := analysis.curve(way, seed)) is not None]
        if not curves:
            continue
        passes = min(map(len, curves))
        mean = np.mean([curve[:passes] for curve in curves], axis=0)
        plot.axes.plot(
            *mean.T, color=_color(way), linestyle=styles[way.remember], linewidth=1.8, marker="o", markersize=2.5
        )
        learned, share = mean[-1]
        plot.label_end(learned, share, f"{_trained(way)}, {_REMEMBERED[way.remember]}", _color(way))
        drawn.append(mean)
    if not drawn:
        return None
    plot.axes.set_xlim(0, 1.5 * max(mean[:, 0].max() for mean in drawn))
    label = _model(model[0])
    return plot.drawing(
        f"kept-{model[0].model}",
        caption=f"{label}: kept of the old against learned of the new, after each pass of the first round",
        text=f"Kept share of the old recall against recall of the new facts, pass by pass, {label}. "
        f"Ends: {plot.reading}.",
    )


def _findings(runs: StudyRuns) -> Findings:
    analysis = LifelongAnalysis(runs)
    if not analysis.ways:
        return Findings(findings=[], sections=[], repeatable=list(runs.done.name))
    models: dict[str, list[Way]] = {}
    for way in analysis.ways:
        models.setdefault(way.model, []).append(way)
    kept = [_kept_against_learned(analysis, model) for model in models.values()]
    triangles = [_triangles(analysis, model) for model in models.values()]
    tables = (
        *(_rounds_table(analysis), _equal_learning_table(analysis), _cost_table(analysis)),
        *(_tuning_table(runs), _triangles_table(analysis)),
    )
    return Findings(
        findings=_Verdicts(analysis).all(),
        sections=[
            Section(title="Kept and learned", drawings=tuple(filter(None, kept))),
            Section(title="Round by round", drawings=tuple(filter(None, triangles))),
            *(Section(title=table.title, tables=(table,)) for table in tables),
        ],
        repeatable=list(runs.done.name),
    )


def _tuning_table(runs: StudyRuns) -> Table:
    """Return the table of the tuning: the mean loss of new and of old facts, by learning rate."""
    tuned = runs.done[runs.done.stage == "tuning"]
    rows = []
    for name, rate in zip(tuned.name, tuned.learning_rate, strict=True):
        planned, last = runs.planned[name], runs.results[name].validation[-1]
        way, nats = way_of(planned.axes, planned.method), (last["nats_per_fact"], last[f"{BASE}_nats_per_fact"])
        rows.append(
            (
                *(_model(way), _trained(way), _REMEMBERED[way.remember], f"{rate:.2g}"),
                *(f"{value:.2f}" for value in nats),
                f"{sum(nats) / 2:.3f}",
            )
        )
    return Table(
        name="tuning",
        title="Learning rates",
        columns=(
            *("model", "trained", "remembered by", "learning rate"),
            *("nats a fact, new", "nats a fact, old", "their mean"),
        ),
        rows=tuple(rows),
        note="On a round that is not judged, with one seed. The least mean was chosen.",
        is_folded=True,
    )


LIFELONG = Study(
    name="lifelong",
    summary="New facts taught to trained models, round by round: what is learned, and what is left of the old.",
    question="Taught new facts round by round, which model, trained how, keeps most of what it knew?",
    stages=stages,
    is_about_facts=True,
    teaches=True,
    findings=_findings,
)
