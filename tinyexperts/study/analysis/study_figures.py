"""The figures of a study's report: isoFLOP curves as in Figure 1 of the paper, and curves of ablations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinyexperts.report.numbers import format_count, signed
from tinyexperts.report.style import GREY, INK, Drawing, house_style, label_ends, new_axes, svg_of
from tinyexperts.study.analysis.ablation_analysis import AblationAnalysis
from tinyexperts.study.analysis.figures import METHOD_STYLES
from tinyexperts.study.analysis.isoflop_analysis import BASELINES, IsoFlopAnalysis
from tinyexperts.study.analysis.run_results import method_label
from tinyexperts.study.analysis.study_points import Group
from tinyexperts.study.scales import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of an axis, that the label of a tick takes at least.
_TICK_ROOM = 0.12
_COUNTS = {"active": "active parameters", "total": "parameters in all", "matmul": "parameters of matrix products"}


def isoflop_curves(analysis: IsoFlopAnalysis, budget: float, count: str) -> Drawing | None:
    """Loss against size at one budget: each run a point, each method's parabola a line, its minimum a large mark.

    None for a budget that was run at one size only.
    """
    drawn = [method for method in METHODS if analysis.of(method, budget)]
    if max((len(analysis.of(method, budget)) for method in drawn), default=0) < 2:
        return None
    with house_style():
        figure, axes = new_axes(_COUNTS[count], "held-out loss, nats a token")
        ends, sizes = [], []
        for method in drawn:
            color, marker = METHOD_STYLES[method]
            points = [point for group in analysis.of(method, budget) for point in group.points]
            x = np.array([getattr(point.cost, f"parameters_{count}") for point in points], dtype=float)
            y = np.array([point.loss for point in points])
            sizes.append(x)
            axes.plot(x, y, linestyle="", marker=marker, markersize=4, color=color, alpha=0.6)
            fit = analysis.fit(method, budget, count)
            if fit is not None and fit.has_curve:
                line = np.geomspace(x.min(), x.max(), 60)
                values = np.array([fit.loss_at(size) for size in line])
                axes.plot(line, values, color=color, linewidth=1.6)
                if fit.optimum is not None:
                    axes.plot(fit.optimum, fit.loss_at_optimum, marker=marker, markersize=9, color=color)
            largest = x == x.max()
            ends.append((float(x.max()), float(y[largest].mean()), method_label(method), color))
        every = np.concatenate(sizes)
        _log_axis(axes, every, room=1.6)
        label_ends(axes, ends)
        text = f"Held-out loss against {_COUNTS[count]} at {budget:.0e} training FLOPs, by method."
        svg = svg_of(figure, f"isoflop-{budget:.0e}-{count}", text)
    return Drawing(caption=f"{budget:.0e} training FLOPs, by {_COUNTS[count]}", svg=svg)


def difference_trend(analysis: IsoFlopAnalysis) -> Drawing | None:
    """PEER minus each baseline against the budget, with 95 % intervals; None for fewer than two budgets."""
    if len(analysis.budgets) < 2:
        return None
    with house_style():
        figure, axes = new_axes("training FLOPs", "PEER minus baseline, nats a token")
        axes.axhline(0, color=GREY, linewidth=1.2)
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
            color, marker = METHOD_STYLES[baseline]
            x = np.array(list(found)) * 1.05 ** (number - 1)  # beside each other, so that no bar hides another
            y = np.array([difference.mean for difference in found.values()])
            bounds = np.array([difference.bounds for difference in found.values()])
            known = np.isfinite(bounds).all(1)  # one seed has no interval, and gets no bar
            axes.plot(x, y, color=color, marker=marker, linewidth=1.6, label=f"against {method_label(baseline)}")
            bars = np.abs(bounds[known] - y[known, None]).T
            axes.errorbar(x[known], y[known], yerr=bars, color=color, linestyle="", elinewidth=1.2, capsize=3)
            # An interval of two seeds can be so wide that nothing else could be seen: its bar may leave the frame.
            at_least_three = [len(difference.values) > 2 for difference in found.values()]
            spread += [*y, *bounds[known & at_least_three].ravel()]
            readings.append(f"against {method_label(baseline)} {signed(float(y[-1]))}")
        if not readings:
            return None
        axes.set_xscale("log")
        axes.set_xticks(analysis.budgets, [f"{budget:.0e}" for budget in analysis.budgets])
        axes.minorticks_off()
        axes.set_xlim(analysis.budgets[0] / 1.4, analysis.budgets[-1] * 1.4)
        margin = max(0.01, 0.2 * float(np.ptp(spread)))
        axes.set_ylim(min([*spread, 0.0]) - margin, max([*spread, 0.0]) + margin)
        axes.legend(loc="best", frameon=False)
        text = f"PEER minus each baseline by budget, 95 percent intervals. At the largest: {', '.join(readings)}."
        svg = svg_of(figure, "difference-trend", text)
    return Drawing(caption="PEER minus each baseline by budget, 95 % intervals; below zero PEER leads", svg=svg)


def losses_by_time(analysis: IsoFlopAnalysis) -> Drawing | None:
    """Loss against seconds of training: each method at its best size of each budget. None for fewer than two."""
    with house_style():
        figure, axes = new_axes("seconds of training", "held-out loss, nats a token")
        ends, every = [], []
        for method in METHODS:
            bests = [best for budget in analysis.budgets if (best := analysis.best(method, budget)) is not None]
            x = np.array([analysis.seconds(best) for best in bests])
            if len(bests) < 2 or not np.isfinite(x).all():
                continue
            color, marker = METHOD_STYLES[method]
            means = [best.mean_loss() for best in bests]
            axes.plot(x, means, color=color, marker=marker, linewidth=1.6)
            for position, best in zip(x, bests, strict=True):
                losses = list(best.losses().values())
                seeds = [position] * len(losses)
                axes.plot(seeds, losses, linestyle="", marker=marker, markersize=3, color=color, alpha=0.6)
            every.append(x)
            ends.append((float(x[-1]), means[-1], f"{method_label(method)} {means[-1]:.3f}", color))
        if not ends:
            return None
        _log_axis(axes, np.concatenate(every), room=2.2)
        axes.margins(y=0.15)  # for labels that are moved apart
        label_ends(axes, ends)
        reading = ", ".join(text for *_, text, _ in ends)
        svg = svg_of(figure, "losses-by-time", f"Held-out loss against seconds of training. It ends at {reading}.")
    return Drawing(caption="Each method at its best width of each budget, by seconds of training", svg=svg)


def residuals(analysis: IsoFlopAnalysis) -> Drawing | None:
    """Measured minus fitted loss of each method's law L(P, D) against the tokens of the run; None without a fit."""
    fits = analysis.laws
    if not fits:
        return None
    with house_style():
        figure, axes = new_axes("training tokens", "measured minus fitted loss, nats")
        axes.axhline(0, color=GREY, linewidth=1.2)
        every = []
        for method, fit in fits.items():
            color, marker = METHOD_STYLES[method]
            tokens = np.array([float(point.cost.num_tokens) for point in analysis.points_of(method)])
            label = method_label(method)
            axes.plot(tokens, fit.residuals, linestyle="", marker=marker, color=color, markersize=4, label=label)
            every.append(tokens)
        _log_axis(axes, np.concatenate(every), room=1.15)
        axes.legend(loc="best", frameon=False, ncols=len(fits), columnspacing=1.0, handletextpad=0.2)
        largest = max(float(np.abs(fit.residuals).max()) for fit in fits.values())
        text = f"Residuals of the laws L(P, D) against training tokens, at most {largest:.3f} nats."
        svg = svg_of(figure, "residuals", text)
    return Drawing(caption="What the laws L(P, D) leave unexplained", svg=svg)


def ablation_curves(analysis: AblationAnalysis) -> Drawing | None:
    """Loss along the study's axis."""
    return _curves(analysis, "held-out loss, nats a token", Group.losses)


def unevenness_curves(analysis: AblationAnalysis) -> Drawing | None:
    """Unevenness of the experts' use along the study's axis; None where nothing has experts."""
    return _curves(analysis, "unevenness, nats", Group.unevenness)


def _curves(analysis: AblationAnalysis, what: str, values: Callable[[Group], dict[int, float]]) -> Drawing | None:
    """Each series a line through its means, each seed a point; None where there is nothing to draw along the axis."""
    series, axis = analysis.series_along(analysis.drawn_axis), analysis.drawn_axis
    if len({group.first.run.axes[axis] for group in analysis.groups}) < 2 or not all(map(values, analysis.groups)):
        return None
    name = axis.replace("_", " ")
    colors = [color for color, _ in METHOD_STYLES.values()]
    with house_style():
        figure, axes = new_axes(name, what)
        ends = []
        for number, (key, groups) in enumerate(series.items()):
            color = colors[number % len(colors)]
            x = [float(group.first.run.axes[axis]) for group in groups]
            for position, group in zip(x, groups, strict=True):
                seeds = list(values(group).values())
                axes.plot(
                    [position] * len(seeds), seeds, linestyle="", marker="o", markersize=3, color=color, alpha=0.6
                )
            means = [statistics.fmean(values(group).values()) for group in groups]
            axes.plot(x, means, color=color, linewidth=1.8)
            ends.append((x[-1], means[-1], _series_label(key, series), color))
        every = np.array([float(group.first.run.axes[axis]) for group in analysis.groups])
        if every.min() > 0 and every.max() / every.min() > 4:
            _log_axis(axes, every, room=3.0)
        else:
            axes.set_xlim(every.min() - 0.3, every.max() + 0.5 * (np.ptp(every) or 1))
            axes.set_xticks(np.unique(every))
        label_ends(axes, ends)
        title = what.partition(",")[0].capitalize()
        svg = svg_of(figure, f"{title}-{analysis.study}", f"{title} against {name}.")
    return Drawing(caption=f"{title} by {name}", svg=svg)


def _series_label(key: Sequence[tuple[str, object]], series: dict[tuple[tuple[str, object], ...], list[Group]]) -> str:
    """What tells a series from the others."""
    telling = [(name, value) for name, value in key if len({dict(other).get(name) for other in series}) > 1]
    return ", ".join(_named(name, value) for name, value in telling) or "PEER"


def _named(name: str, value: object) -> str:
    if name == "query_norm":
        return f"query norm: {value}"
    return f"{value:.0e}" if name == "budget" else str(value)


def _log_axis(axes: Axes, values: np.ndarray, *, room: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(values.min() / 1.15, values.max() * room)
    ticks: list[float] = []
    apart = _TICK_ROOM * math.log(values.max() * room / values.min())
    for value in np.unique(values)[::-1]:  # from the largest, which is named always
        if not ticks or math.log(ticks[-1] / value) >= apart:
            ticks.append(float(value))
    axes.set_xticks(ticks)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=INK)
