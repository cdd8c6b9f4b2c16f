"""The tables of the isoFLOP study's report, with the paper's numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tinyexperts.comparison.findings import format_interval
from tinyexperts.comparison.frame import HELD_OUT
from tinyexperts.comparison.methods import label_of
from tinyexperts.report.numbers import MISSING, format_count, signed
from tinyexperts.report.table import Table
from tinyexperts.statistics.compute_multiplier import compute_multiplier
from tinyexperts.statistics.power_law_fit import SIZE_AND_TOKENS
from tinyexperts.statistics.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.frame import FLOPS
from tinyexperts.study.analysis.paper_results import PAPER_PERPLEXITY, PAPER_TEXTS
from tinyexperts.study.analysis.tables import (
    COST_COLUMNS,
    LAW_NOTE,
    RESULT_COLUMNS,
    cost_cells,
    law_cells,
    law_columns,
    missing_law_cells,
    number,
    result_cells,
)
from tinyexperts.study.studies.isoflop.analysis import (
    AT_EQUAL_TIME,
    BASELINES,
    NAMES,
    IsoFlopAnalysis,
    tuning_label,
)

if TYPE_CHECKING:
    import pandas as pd

_OUTCOMES = {"undecided": "no difference shown", "lower": "PEER lower", "higher": "PEER higher"}


def isoflop_tables(analysis: IsoFlopAnalysis) -> list[Table]:
    """Return all tables of the study but those that every study has."""
    return [
        _perplexities(analysis),
        _differences(analysis),
        _differences_by_width(analysis),
        _multipliers(analysis),
        _optima(analysis),
        _laws(analysis),
        sizes_table(analysis),
        _flops(analysis),
        tuning_table(analysis),
    ]


def _perplexities(analysis: IsoFlopAnalysis) -> Table:
    texts, rows = analysis.texts, []
    for budget in analysis.budgets:
        for method in NAMES:
            best = analysis.best(method, budget)
            if best is not None:
                means = [analysis.losses(method, budget, text).loc[best].mean() for text in texts]
                unfinished = "" if analysis.is_finished(method, budget) else ", unfinished"
                head = (f"{budget:.0e}", label_of(method) + unfinished, str(best))
                rows.append((*head, *(f"{math.exp(mean):.2f}" for mean in means), *(MISSING,) * len(PAPER_TEXTS)))
    for budget, by_method in PAPER_PERPLEXITY.items():
        for method, perplexities in by_method.items():
            blank = (MISSING,) * (1 + len(texts))
            rows.append((f"paper, {budget:.0e}", label_of(method), *blank, *map("{:.2f}".format, perplexities)))
    return Table(
        name="perplexity",
        title="Perplexity of each method at its own best size",
        columns=("FLOPs", "method", "width", *(text.removeprefix("loss, ") for text in texts), *PAPER_TEXTS),
        rows=tuple(rows),
        note="Of the mean loss over seeds. The paper's texts and tokens are others: compare the order. A mixture "
        "of experts is evaluated by thresholds, which let no token see later ones; it trains by expert choice.",
    )


def _differences(analysis: IsoFlopAnalysis) -> Table:
    def outcome(baseline: str, budget: float, what: str, found: SeedInterval) -> str:
        if not analysis.is_compared(baseline, budget):
            return "unfinished"
        return "not judged" if what == AT_EQUAL_TIME else _OUTCOMES[found.outcome]

    rows = [
        (f"{budget:.0e}", label_of(baseline), what, *_interval(found), outcome(baseline, budget, what, found))
        for budget in analysis.budgets
        for baseline in BASELINES
        for what, found in analysis.differences(baseline, budget).items()
    ]
    return Table(
        name="differences",
        title="PEER minus each baseline, nats a token, each at its own best size",
        columns=("FLOPs", "baseline", "on", "mean", "deviation over seeds", "95 % interval", "outcome"),
        rows=tuple(rows),
        note=f"Paired by seed. A difference whose interval holds zero is no win, and of {len(rows)} intervals at "
        "95 % one in twenty leaves zero out by chance. The width is the best of the same seeds, and where it is by the "
        "other seeds, each seed is compared at the width that is best for the others. Router not counted: "
        "what the baseline reaches at as many FLOPs, the routers of both left out. At equal time: what the baseline "
        "reaches in PEER's seconds; a method's seconds are its tokens at the median speed of its runs of that width. "
        "Both lie between two budgets of the baseline, on a straight line in the logarithm, which lies above a curve "
        "that flattens: in PEER's favour. At equal time the interval is of the losses alone, and speeds vary with what "
        "else a machine does: nothing is judged by it.",
    )


def _differences_by_width(analysis: IsoFlopAnalysis) -> Table:
    rows = []
    for budget in analysis.budgets:
        ours = analysis.losses("peer", budget)
        for baseline in BASELINES:
            unfinished = "" if analysis.is_compared(baseline, budget) else ", unfinished"
            for width, theirs in analysis.losses(baseline, budget).iterrows():
                found = paired_difference(ours.loc[width].dropna(), theirs.dropna()) if width in ours.index else None
                if found is not None:
                    head = (f"{budget:.0e}", label_of(baseline) + unfinished, str(width))
                    rows.append((*head, *_interval(found), str(len(found.values))))
    return Table(
        name="differences-by-width",
        title="PEER minus each baseline on the held-out text, nats a token, at equal width",
        columns=("FLOPs", "baseline", "width", "mean", "deviation over seeds", "95 % interval", "seeds"),
        rows=tuple(rows),
        note=f"Paired by seed; of {len(rows)} intervals at 95 % one in twenty leaves zero out by chance.",
    )


def _multipliers(analysis: IsoFlopAnalysis) -> Table:
    by_seed: dict[int, dict[float, float]] = {}
    for budget in analysis.budgets:
        dense = analysis.at_best("dense", budget) if analysis.is_finished("dense", budget) else None
        for seed, loss in dense.items() if dense is not None else ():
            by_seed.setdefault(seed, {})[budget] = loss
    rows = []
    for budget in analysis.budgets:
        for method in NAMES[1:]:
            losses, head = analysis.at_best(method, budget), (f"{budget:.0e}", label_of(method))
            if losses is None:
                continue
            if not analysis.is_finished(method, budget):
                rows.append((*head, MISSING, MISSING, "unfinished"))
                continue
            found = compute_multiplier(by_seed, dict(losses), budget)
            interval = MISSING if found.interval is None else "{:.2f} to {:.2f}".format(*found.interval)
            rows.append((*head, number(found.value, ".2f"), interval, found.refusal or ""))
    return Table(
        name="compute-multiplier",
        title="How many times more FLOPs dense needs for the same loss",
        columns=("FLOPs", "method", "multiplier", "95 % interval", "why none"),
        rows=tuple(rows),
        note="Between two budgets dense's loss is a straight line in the logarithm of the FLOPs, which lies above a "
        "curve that flattens: the multiplier is a little too large. At the least budget one below 1 can't be seen.",
    )


def _optima(analysis: IsoFlopAnalysis) -> Table:
    rows = []
    for budget in analysis.budgets:
        for method in NAMES:
            for count in ("active", "total", "matmul"):
                fit = analysis.fit(method, budget, count)
                if fit is None:
                    continue
                ends = fit.optimum_interval
                interval = MISSING if ends is None else " to ".join(map(_open_end, ends))
                loss = number(fit.loss_at_optimum, ".3f")
                of_loss = MISSING if fit.loss_interval is None else "{:.3f} to {:.3f}".format(*fit.loss_interval)
                residuals = f"{math.sqrt(float((fit.residuals**2).mean())):.3f}" if fit.has_curve else MISSING
                unfinished = [] if analysis.is_finished(method, budget) else ["unfinished"]
                why = ", ".join([*unfinished, *([fit.refusal] if fit.refusal else [])])
                head = (f"{budget:.0e}", label_of(method), count)
                rows.append((*head, format_count(fit.optimum), interval, loss, of_loss, residuals, why))
    return Table(
        name="optimum",
        title="The size of least loss, by a parabola in its logarithm",
        columns=(
            *("FLOPs", "method", "parameters", "optimum", "95 % interval", "loss there", "its 95 % interval"),
            *("residuals, nats (RMS)", "why none"),
        ),
        rows=tuple(rows),
    )


def _laws(analysis: IsoFlopAnalysis) -> Table:
    rows = []
    for method in NAMES:
        fit = analysis.laws.get(method)
        if fit is None:
            cells = missing_law_cells(SIZE_AND_TOKENS, "fewer different runs than the law has parameters")
        else:
            is_finished = all(analysis.is_finished(method, budget) for budget in analysis.budgets)
            cells = law_cells(fit, is_finished=is_finished)
        rows.append((label_of(method), *cells))
    return Table(
        name="scaling-law",
        title="L(P, D) = c + a / P^alpha + b / D^beta, P active parameters, D tokens",
        columns=("method", *law_columns(SIZE_AND_TOKENS)),
        rows=tuple(rows),
        note=f"Of all runs of a method, its seeds too. {LAW_NOTE}",
    )


def sizes_table(analysis: IsoFlopAnalysis) -> Table:
    """Return the table of every size and budget."""
    return Table(
        name="points",
        title="Every size and budget",
        columns=("method", "budget", "width", *COST_COLUMNS, *RESULT_COLUMNS),
        rows=tuple(
            (label_of(p.method), f"{p.budget:.0e}", str(p.width), *cost_cells(p), *result_cells(p))
            for p in analysis.points.itertuples()
        ),
    )


def _flops(analysis: IsoFlopAnalysis) -> Table:
    def row(point: pd.Series) -> tuple[str, ...]:
        shares = (f"{point[f'{part}_flops'] / point.total_flops:.1%}" for part in FLOPS)
        return (label_of(point.method), str(point.width), format_count(point.total_flops), *shares)

    points = analysis.points
    unspent = (2 * points.sub_key_scores_flops / (3 * points.total_flops)).max()
    return Table(
        name="flops",
        title="FLOPs a token of a forward pass, by module",
        columns=(
            *("method", "width", "FLOPs", "attention", "dense layers", "query network or router"),
            *("sub-key scores", "experts", "head"),
        ),
        rows=tuple(row(point) for _, point in points.drop_duplicates(["method", "width"]).iterrows()),
        note="Training is counted as three times as much, the scores of sub-keys too, though their backward pass "
        "touches the chosen ones alone: of the FLOPs of PEER and PKM up to "
        f"{0.0 if math.isnan(unspent) else unspent:.1%} are counted and not spent.",
    )


def tuning_table(analysis: IsoFlopAnalysis) -> Table:
    """Return the table of the tuning runs."""
    tuning = analysis.tuning
    hours = tuning.seconds.groupby(tuning.method, sort=False).sum() / 3600
    return Table(
        name="tuning",
        title="Tuning: one seed at one budget and the middle width",
        columns=("method", "setting", "loss", "seconds"),
        rows=tuple(
            (label_of(run.method), tuning_label(run), f"{run[HELD_OUT]:.3f}", f"{run.seconds:,.0f}")
            for _, run in tuning.iterrows()
        ),
        note="Each setting is changed by itself, and twice as far where that was best; the best value of each is "
        f"taken, all together. Hours: {', '.join(f'{label_of(name)} {value:.2f}' for name, value in hours.items())}.",
    )


def _interval(found: SeedInterval) -> tuple[str, str, str]:
    return signed(found.mean), number(found.standard_deviation, ".3f"), format_interval(found)


def _open_end(value: float) -> str:
    return "open" if math.isinf(value) or value == 0 else format_count(value)
