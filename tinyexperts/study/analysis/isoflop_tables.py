"""The tables of the isoFLOP study's report, and the paper's numbers beside them."""

from __future__ import annotations

import math

from tinyexperts.report.numbers import MISSING, format_count, signed
from tinyexperts.report.table import Table
from tinyexperts.study.analysis.claim import format_interval
from tinyexperts.study.analysis.fits.compute_multiplier import compute_multiplier
from tinyexperts.study.analysis.fits.power_law_fit import SIZE_AND_TOKENS
from tinyexperts.study.analysis.fits.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.isoflop_analysis import AT_EQUAL_TIME, BASELINES, IsoFlopAnalysis, tuning_label
from tinyexperts.study.analysis.law_cells import LAW_NOTE, law_cells, law_columns, missing_law_cells
from tinyexperts.study.analysis.paper_results import PAPER_PERPLEXITY, PAPER_TEXTS
from tinyexperts.study.analysis.run_results import method_label
from tinyexperts.study.analysis.run_tables import COST_COLUMNS, RESULT_COLUMNS, cost_cells, result_cells
from tinyexperts.study.scales import METHODS


def isoflop_tables(analysis: IsoFlopAnalysis) -> list[Table]:
    return [
        _perplexities(analysis),
        _differences(analysis),
        _differences_by_width(analysis),
        _multipliers(analysis),
        _optima(analysis),
        _laws(analysis),
        _points(analysis),
        _flops(analysis),
        _tuning(analysis),
    ]


def _perplexities(analysis: IsoFlopAnalysis) -> Table:
    texts = list(dict.fromkeys(text for group in analysis.groups for text in group.first.losses))
    rows = []
    for budget in analysis.budgets:
        for method in METHODS:
            best = analysis.best(method, budget)
            if best is not None:
                values = tuple(f"{math.exp(best.mean_loss(text)):.2f}" for text in texts)
                width, blank = str(best.first.run.axes["width"]), (MISSING,) * len(PAPER_TEXTS)
                unfinished = "" if analysis.is_finished(method, budget) else ", unfinished"
                rows.append((f"{budget:.0e}", method_label(method) + unfinished, width, *values, *blank))
    for budget, by_method in PAPER_PERPLEXITY.items():
        for method, perplexities in by_method.items():
            blank = (MISSING,) * (1 + len(texts))
            rows.append((f"paper, {budget:.0e}", method_label(method), *blank, *map("{:.2f}".format, perplexities)))
    return Table(
        name="perplexity",
        title="Perplexity of each method at its own best size",
        columns=("FLOPs", "method", "width", *texts, *PAPER_TEXTS),
        rows=tuple(rows),
        note="Of the mean loss over seeds. The paper's texts and tokens are others: compare the order. A mixture "
        "of experts is evaluated by thresholds, which let no token see later ones; it trains by expert choice.",
    )


def _differences(analysis: IsoFlopAnalysis) -> Table:
    def outcome(baseline: str, budget: float, what: str, found: SeedInterval) -> str:
        if not analysis.is_compared(baseline, budget):
            return "unfinished"
        if what == AT_EQUAL_TIME:
            return "not judged"
        told = {"undecided": "no difference shown", "lower": "PEER lower", "higher": "PEER higher"}
        return told[found.outcome]

    rows = [
        (f"{budget:.0e}", method_label(baseline), what, *_interval(found), outcome(baseline, budget, what, found))
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
        ours = {group.first.run.axes["width"]: group for group in analysis.of("peer", budget)}
        for baseline in BASELINES:
            unfinished = "" if analysis.is_compared(baseline, budget) else ", unfinished"
            for group in analysis.of(baseline, budget):
                width = group.first.run.axes["width"]
                found = paired_difference(ours[width].losses(), group.losses()) if width in ours else None
                if found is not None:
                    head = (f"{budget:.0e}", method_label(baseline) + unfinished, str(width))
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
        best = analysis.best("dense", budget) if analysis.is_finished("dense", budget) else None
        for seed, loss in best.losses().items() if best else ():
            by_seed.setdefault(seed, {})[budget] = loss
    rows = []
    for budget in analysis.budgets:
        for method in METHODS[1:]:
            best = analysis.best(method, budget)
            if best is None:
                continue
            if not analysis.is_finished(method, budget):
                rows.append((f"{budget:.0e}", method_label(method), MISSING, MISSING, "unfinished"))
                continue
            found = compute_multiplier(by_seed, best.losses(), budget)
            value = MISSING if found.value is None else f"{found.value:.2f}"
            interval = MISSING if found.interval is None else "{:.2f} to {:.2f}".format(*found.interval)
            rows.append((f"{budget:.0e}", method_label(method), value, interval, found.refusal or ""))
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
        for method in METHODS:
            for count in ("active", "total", "matmul"):
                fit = analysis.fit(method, budget, count)
                if fit is None:
                    continue
                optimum = MISSING if fit.optimum is None else format_count(fit.optimum)
                ends = fit.optimum_interval
                interval = MISSING if ends is None else f"{_open(ends[0])} to {_open(ends[1])}"
                loss = MISSING if fit.loss_at_optimum is None else f"{fit.loss_at_optimum:.3f}"
                low_and_high = fit.loss_interval
                of_loss = MISSING if low_and_high is None else f"{low_and_high[0]:.3f} to {low_and_high[1]:.3f}"
                left = f"{math.sqrt(float((fit.residuals**2).mean())):.3f}" if fit.has_curve else MISSING
                unfinished = [] if analysis.is_finished(method, budget) else ["unfinished"]
                why = ", ".join([*unfinished, *([fit.refusal] if fit.refusal else [])])
                rows.append((f"{budget:.0e}", method_label(method), count, optimum, interval, loss, of_loss, left, why))
    return Table(
        name="optimum",
        title="The size of least loss, by a parabola in its logarithm",
        columns=(
            "FLOPs",
            "method",
            "parameters",
            "optimum",
            "95 % interval",
            "loss there",
            "its 95 % interval",
            "residuals, nats (RMS)",
            "why none",
        ),
        rows=tuple(rows),
    )


def _laws(analysis: IsoFlopAnalysis) -> Table:
    rows = []
    for method in METHODS:
        fit = analysis.laws.get(method)
        if fit is None:
            cells = missing_law_cells(SIZE_AND_TOKENS, "fewer different runs than the law has parameters")
        else:
            is_finished = all(analysis.is_finished(method, budget) for budget in analysis.budgets)
            cells = law_cells(fit, is_finished=is_finished)
        rows.append((method_label(method), *cells))
    return Table(
        name="scaling-law",
        title="L(P, D) = c + a / P^alpha + b / D^beta, P active parameters, D tokens",
        columns=("method", *law_columns(SIZE_AND_TOKENS)),
        rows=tuple(rows),
        note=f"Of all runs of a method, its seeds too. {LAW_NOTE}",
    )


def _points(analysis: IsoFlopAnalysis) -> Table:
    rows = []
    for group in analysis.groups:
        run = group.first.run
        place = (method_label(run.method), f"{run.axes['budget']:.0e}", str(run.axes["width"]))
        rows.append((*place, *cost_cells(group), *result_cells(group)))
    return Table(
        name="points",
        title="Every size and budget",
        columns=("method", "budget", "width", *COST_COLUMNS, *RESULT_COLUMNS),
        rows=tuple(rows),
    )


def _flops(analysis: IsoFlopAnalysis) -> Table:
    rows, unspent = {}, []
    for group in analysis.groups:
        flops, run = group.first.cost.forward_flops, group.first.run
        unspent.append(2 * flops.sub_key_scores / (3 * flops.total))
        parts = (flops.attention, flops.dense_layers, flops.query_network, flops.sub_key_scores, flops.experts)
        shares = (f"{part / flops.total:.1%}" for part in (*parts, flops.head))
        head = (method_label(run.method), str(run.axes["width"]))
        rows[head] = (*head, format_count(flops.total), *shares)
    return Table(
        name="flops",
        title="FLOPs a token of a forward pass, by module",
        columns=(
            *("method", "width", "FLOPs", "attention", "dense layers", "query network or router"),
            *("sub-key scores", "experts", "head"),
        ),
        rows=tuple(rows.values()),
        note="Training is counted as three times as much, the scores of sub-keys too, though their backward pass "
        "touches the chosen ones alone: of the FLOPs of PEER and PKM up to "
        f"{max(unspent, default=0.0):.1%} are counted and not spent.",
    )


def _tuning(analysis: IsoFlopAnalysis) -> Table:
    rows = []
    hours = dict.fromkeys((method_label(point.run.method) for point in analysis.tuning), 0.0)
    for point in analysis.tuning:
        rows.append((method_label(point.run.method), tuning_label(point), f"{point.loss:.3f}", f"{point.seconds:,.0f}"))
        hours[method_label(point.run.method)] += point.seconds / 3600
    return Table(
        name="tuning",
        title="Tuning: one seed at the smallest budget and the middle width",
        columns=("method", "setting", "loss", "seconds"),
        rows=tuple(rows),
        note="Each setting is changed by itself, and twice as far where that was best; the best value of each is "
        f"taken, all together. Hours: {', '.join(f'{method} {value:.2f}' for method, value in hours.items())}.",
    )


def _interval(found: SeedInterval) -> tuple[str, str, str]:
    deviation = found.standard_deviation
    return signed(found.mean), MISSING if deviation is None else f"{deviation:.3f}", format_interval(found)


def _open(value: float) -> str:
    return "open" if math.isinf(value) or value == 0 else format_count(value)
