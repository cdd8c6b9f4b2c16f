"""The figures of the isoFLOP study's report: curves as in Figure 1 of the paper, differences, seconds, residuals."""

from __future__ import annotations

import numpy as np

from tinyexperts.comparison.frame import HELD_OUT
from tinyexperts.comparison.methods import label_of, look_of
from tinyexperts.report.numbers import signed
from tinyexperts.report.style import Drawing, Plot, house_style
from tinyexperts.study.studies.isoflop.analysis import BASELINES, NAMES, IsoFlopAnalysis

_COUNTS = {"active": "active parameters", "total": "parameters in all", "matmul": "parameters of matrix products"}


def isoflop_figures(analysis: IsoFlopAnalysis) -> list[Drawing]:
    """Return all figures that can be drawn."""
    drawings = [difference_trend(analysis)]
    drawings += [isoflop_curves(analysis, budget, count) for budget in analysis.budgets for count in _COUNTS]
    drawings += [losses_by_time(analysis), residuals(analysis)]
    return [drawing for drawing in drawings if drawing is not None]


@house_style()
def isoflop_curves(analysis: IsoFlopAnalysis, budget: float, count: str) -> Drawing | None:
    """Draw loss against size at one budget: each run, each method's parabola, and a large mark at its minimum.

    Args:
        analysis (IsoFlopAnalysis): the runs.
        budget (float): training FLOPs.
        count (str): the parameters that are the size: total, active or matmul.

    Returns:
        The figure; None for a budget that was run at one size only.
    """
    at_budget = analysis.runs[analysis.runs.budget == budget]
    if at_budget.groupby("method").width.nunique().max() < 2:
        return None
    size = f"parameters_{count}"
    plot = Plot(_COUNTS[count], "held-out loss, nats a token")
    for method, runs in at_budget.groupby("method", sort=False):
        look, x, losses = look_of(method), runs[size].to_numpy(float), runs[HELD_OUT]
        plot.marks(x, losses, look.color, look.marker, 4, alpha=0.6)
        fit = analysis.fit(method, budget, count)
        if fit is not None and fit.has_curve:
            line = np.geomspace(x.min(), x.max(), 60)
            plot.axes.plot(line, [fit.loss_at(size) for size in line], color=look.color, linewidth=1.6)
            if fit.optimum is not None and fit.loss_at_optimum is not None:
                plot.marks(fit.optimum, fit.loss_at_optimum, look.color, look.marker, 9)
        plot.label_end(x.max(), losses[x == x.max()].mean(), look.label, look.color)
    plot.log_x(at_budget[size].to_numpy(float), room=1.6)
    return plot.drawing(
        f"isoflop-{budget:.0e}-{count}",
        caption=f"{budget:.2g} training FLOPs, by {_COUNTS[count]}",
        text=f"Held-out loss against {_COUNTS[count]} at {budget:.2g} training FLOPs, by method.",
    )


@house_style()
def difference_trend(analysis: IsoFlopAnalysis) -> Drawing | None:
    """Draw PEER minus each baseline against the budget, with 95 % intervals; None for fewer than two budgets."""
    if len(analysis.budgets) < 2:
        return None
    plot = Plot("training FLOPs", "PEER minus baseline, nats a token")
    axes = plot.axes
    plot.zero_line()
    readings: list[str] = []
    spread: list[float] = []
    for number, baseline in enumerate(BASELINES):
        found = {
            budget: difference
            for budget in analysis.budgets
            if analysis.is_compared(baseline, budget)
            if (difference := analysis.difference(baseline, budget)) is not None
        }
        if not found:
            continue
        look = look_of(baseline)
        x = np.array(list(found)) * 1.05 ** (number - 1)  # next to each other, so that no bar hides another
        y = np.array([difference.mean for difference in found.values()])
        bounds = np.array([difference.bounds for difference in found.values()])
        known = np.isfinite(bounds).all(1)  # one seed has no interval, and gets no bar
        axes.plot(x, y, color=look.color, marker=look.marker, linewidth=1.6, label=f"against {look.label}")
        bars = np.abs(bounds[known] - y[known, None]).T
        axes.errorbar(x[known], y[known], yerr=bars, color=look.color, linestyle="", elinewidth=1.2, capsize=3)
        # An interval of two seeds can be so wide that nothing else could be seen: its bar may leave the frame.
        at_least_three = [len(difference.values) > 2 for difference in found.values()]
        spread += [*y, *bounds[known & at_least_three].ravel()]
        readings.append(f"against {look.label} {signed(float(y[-1]))}")
    if not readings:
        return None
    axes.set_xscale("log")
    axes.set_xticks(analysis.budgets, [f"{budget:.0e}" for budget in analysis.budgets])
    axes.minorticks_off()
    axes.set_xlim(analysis.budgets[0] / 1.4, analysis.budgets[-1] * 1.4)
    margin = max(0.01, 0.2 * float(np.ptp(spread)))
    axes.set_ylim(min([*spread, 0.0]) - margin, max([*spread, 0.0]) + margin)
    axes.legend(loc="best", frameon=False)
    return plot.drawing(
        "difference-trend",
        caption="PEER minus each baseline by budget, 95 % intervals; below zero PEER leads",
        text=f"PEER minus each baseline by budget, 95 percent intervals. At the largest: {', '.join(readings)}.",
    )


@house_style()
def losses_by_time(analysis: IsoFlopAnalysis) -> Drawing | None:
    """Draw loss against seconds: each method at its best width of each budget. None for fewer than two budgets."""
    plot = Plot("seconds of training", "held-out loss, nats a token")
    every = []
    for method in NAMES:
        losses = {b: found for b in analysis.budgets if (found := analysis.at_best(method, b)) is not None}
        x = np.array([analysis.seconds(method, budget) for budget in losses])
        if len(losses) < 2 or not np.isfinite(x).all():
            continue
        look, means = look_of(method), [found.mean() for found in losses.values()]
        seeds = [list(found) for found in losses.values()]
        plot.means(x, seeds, means, color=look.color, marker=look.marker, linewidth=1.6)
        every.append(x)
        plot.label_end(float(x[-1]), means[-1], f"{look.label} {means[-1]:.3f}", look.color)
    if not every:
        return None
    plot.log_x(np.concatenate(every), room=2.2)
    plot.axes.margins(y=0.15)  # for labels that are moved apart
    return plot.drawing(
        "losses-by-time",
        caption="Each method at its best width of each budget, by seconds of training",
        text=f"Held-out loss against seconds of training. It ends at {plot.reading}.",
    )


@house_style()
def residuals(analysis: IsoFlopAnalysis) -> Drawing | None:
    """Draw measured minus fitted loss of each method's law L(P, D) against the run's tokens; None without a fit."""
    fits = analysis.laws
    if not fits:
        return None
    plot = Plot("training tokens", "measured minus fitted loss, nats")
    plot.zero_line()
    every = []
    for method, fit in fits.items():
        tokens = analysis.runs.num_tokens[analysis.runs.method == method].to_numpy(float)
        look = look_of(method)
        plot.marks(tokens, fit.residuals, look.color, look.marker, 4, label=label_of(method))
        every.append(tokens)
    plot.log_x(np.concatenate(every), room=1.15)
    plot.axes.legend(loc="best", frameon=False, ncols=len(fits), columnspacing=1.0, handletextpad=0.2)
    largest = max(float(np.abs(fit.residuals).max()) for fit in fits.values())
    return plot.drawing(
        "residuals",
        caption="What the laws L(P, D) leave unexplained",
        text=f"Residuals of the laws L(P, D) against training tokens, at most {largest:.3f} nats.",
    )
