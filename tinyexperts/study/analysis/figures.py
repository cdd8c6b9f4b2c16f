"""The report's figures as inline SVG: held-out loss, the difference to a baseline, and the expert-usage histogram.

Drawn through matplotlib's objects (no pyplot state), the same bytes for the same runs. Text stays text, so that the
page's own font draws it. Colours are those of Okabe and Ito, which colour-blind readers tell apart; markers differ too.

matplotlib is imported where it draws: it takes most of a second, and training and serving, which come by this module
through the command line, draw nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinyexperts.report.numbers import power_of_ten, signed
from tinyexperts.report.style import GREY, INK, Drawing, house_style, label_ends, new_axes, svg_of
from tinyexperts.study.analysis.comparison import Comparison, interpolate
from tinyexperts.study.analysis.run_results import ExpertUsage, RunResult, method_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHOD_STYLES = {  # Okabe and Ito, https://jfly.uni-koeln.de/color/
    "dense": ("#D55E00", "s"),
    "peer": ("#0072B2", "o"),
    "product-key-memory": ("#009E73", "^"),
    "pkm": ("#009E73", "^"),
    "expert-choice-moe": ("#CC79A7", "D"),
    "moe": ("#CC79A7", "D"),
}
OTHER_STYLE = ("#5b5f66", "v")
# A curve begins with its fall from chance; a frame that held it would flatten what the figure is for.
LEFT_OUT = 0.3


def method_color(method: str) -> str:
    """The method's colour in all figures, as #rrggbb."""
    return METHOD_STYLES.get(method, OTHER_STYLE)[0]


def loss_curves(runs: Sequence[RunResult], x: str) -> Drawing | None:
    """Held-out loss against `training_flops`, `num_tokens` or `seconds`; None where no run recorded two points of it.

    Each seed is a thin line, the mean of a method's seeds a bold one over what all its seeds cover of the axis; mark
    and label are of the mean of their ends.
    """
    curves = {run: points for run in runs if len(points := _points(run, x)) > 1}
    if not curves:
        return None
    divisor, axis_label = _axis_scale(x, max(points[-1, 0] for points in curves.values()))
    with house_style():
        figure, axes = new_axes(axis_label, "held-out loss, nats a token")
        ends = []
        for method in dict.fromkeys(run.method for run in curves):
            color, marker = METHOD_STYLES.get(method, OTHER_STYLE)
            seeds = [points for run, points in curves.items() if run.method == method]
            for points in seeds:
                axes.plot(points[:, 0] / divisor, points[:, 1], color=color, linewidth=0.9, alpha=0.55)
            mean = _mean_curve(seeds)
            axes.plot(mean[:, 0] / divisor, mean[:, 1], color=color, linewidth=2.4)
            x_end, loss = np.mean([points[-1] for points in seeds], axis=0)
            axes.plot(x_end / divisor, loss, color=color, marker=marker, markersize=6)
            ends.append((x_end / divisor, loss, f"{method_label(method)} {loss:.2f}", color))
        _frame(axes, [points / (divisor, 1) for points in curves.values()], room=1.22)
        label_ends(axes, ends)
        words = {"training_flops": "training FLOPs", "num_tokens": "training tokens", "seconds": "seconds of training"}[
            x
        ]
        reading = ", ".join(text for *_, text, _ in ends)
        svg = svg_of(figure, f"loss-{x}", f"Line chart: held-out loss against {words}. It ends at {reading}.")
    return Drawing(caption=f"Held-out loss against {words}", svg=svg)


def difference_curves(comparison: Comparison) -> Drawing | None:
    """Held-out loss of a method minus the baseline's at equal training FLOPs, all along training."""
    method, baseline = method_label(comparison.method), method_label(comparison.baseline)
    curves = {
        pair.seed: points
        for pair in comparison.seeds
        if len(points := _difference(pair.method, pair.baseline)) > 1 and np.isfinite(points).all()
    }
    if not curves:
        return None
    color, marker = METHOD_STYLES.get(comparison.method, OTHER_STYLE)
    divisor, axis_label = _axis_scale("training_flops", max(points[-1, 0] for points in curves.values()))
    with house_style():
        figure, axes = new_axes(axis_label, f"{method} minus {baseline}, nats a token")
        axes.axhline(0, color=GREY, linewidth=1.2)
        ends = []
        for seed, points in curves.items():
            axes.plot(points[:, 0] / divisor, points[:, 1], color=color, linewidth=0.9, alpha=0.7)
            ends.append((points[-1, 0] / divisor, points[-1, 1], f"seed {seed} {signed(points[-1, 1])}", INK))
        if len(curves) > 1:
            mean = _mean_curve(list(curves.values()))
            axes.plot(mean[:, 0] / divisor, mean[:, 1], color=color, linewidth=2.4)
            axes.plot(mean[-1, 0] / divisor, mean[-1, 1], color=color, marker=marker, markersize=6)
            ends.append((mean[-1, 0] / divisor, mean[-1, 1], f"mean {signed(mean[-1, 1])}", color))
        zero = np.array([[points[-1, 0] / divisor, 0.0] for points in curves.values()])
        _frame(axes, [*(points / (divisor, 1) for points in curves.values()), zero], room=1.32)
        label_ends(axes, ends)
        reading = ", ".join(text for *_, text, _ in ends)
        text = f"Line chart: held-out loss of {method} minus {baseline} at equal training FLOPs. It ends at {reading}."
        svg = svg_of(figure, f"difference-{comparison.method}", text)
    return Drawing(caption=f"{method} minus {baseline} at equal training FLOPs: below zero, {method} leads", svg=svg)


def usage_histogram(run: RunResult, layer: ExpertUsage) -> Drawing | None:
    """Experts by their share of the router weight in even shares (z_i N), on a log axis; unused ones as a bar apart."""
    if layer.expert_share is None or not (layer.expert_share > 0).any():
        return None
    relative_N = layer.expert_share * layer.expert_share.size
    exponents = np.log10(relative_N[relative_N > 0])
    bins = np.arange(4 * math.floor(exponents.min()), 4 * math.ceil(exponents.max() + 1e-9) + 1) / 4
    counts, _ = np.histogram(exponents, bins)
    height = 100 * float((relative_N == 0).mean())
    color = method_color(run.method)
    with house_style():
        figure, axes = new_axes("router weight of an expert, in even shares", "experts, %")
        axes.bar(bins[:-1], 100 * counts / relative_N.size, width=0.25, align="edge", color=color, edgecolor="white")
        span = bins[-1] - bins[0]
        apart = bins[0] - 0.15 * span
        axes.bar(apart, height, width=0.08 * span, color=GREY)
        axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 1.16 * axes.get_ylim()[1])
        axes.annotate(
            "even share", (0, 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top"
        )
        axes.annotate(f"{height:.1f} %", (apart, height), (0, 3), textcoords="offset points", ha="center")
        step = max(1, math.ceil(span / 6))
        powers = range(int(bins[0]), int(bins[-1]) + 1, step)
        axes.set_xticks([apart, *powers], ["unused", *(power_of_ten(power) for power in powers)])
        text = (
            f"Histogram of {relative_N.size:,} experts by router weight: {height:.1f} percent unused, "
            f"the rest from {relative_N[relative_N > 0].min():.2g} to {relative_N.max():.3g} even shares."
        )
        svg = svg_of(figure, f"usage-{run.name}-layer{layer.layer}", text)
    return Drawing(caption=f"{run.label}, seed {run.seed}, layer {layer.layer}", svg=svg)


def _points(run: RunResult, x: str) -> np.ndarray:
    """[num_points, 2] of the axis and the held-out loss, without what isn't finite."""
    points = np.array([(line[x], line["loss"]) for line in run.validation if x in line and "loss" in line], dtype=float)
    points = points.reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def _difference(run: RunResult, twin: RunResult) -> np.ndarray:
    """[num_points, 2] of training FLOPs and the difference, at the points of the run that the twin's curve covers."""
    points = [(flops, loss - other) for flops, loss, other in _matched(run, twin) if other is not None]
    return np.array(points, dtype=float).reshape(-1, 2)


def _matched(run: RunResult, twin: RunResult) -> list[tuple[float, float, float | None]]:
    """The run's points with the twin's loss there; budgets end on a whole step, so one may end just past the other."""
    twin_end = max((line["training_flops"] for line in twin.validation), default=0)
    return [
        (flops, loss, interpolate(twin.validation, "training_flops", min(flops, twin_end)))
        for flops, loss in _points(run, "training_flops")
        if flops <= 1.01 * twin_end
    ]


def _mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of curves over the part of the axis that all of them cover, at every point of any of them."""
    x = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    x = x[(x >= max(curve[0, 0] for curve in curves)) & (x <= min(curve[-1, 0] for curve in curves))]
    return np.column_stack([x, np.mean([np.interp(x, curve[:, 0], curve[:, 1]) for curve in curves], axis=0)])


def _axis_scale(x: str, largest: float) -> tuple[float, str]:
    """What to divide an axis by so that its ticks are short numbers, and its label."""
    if x == "training_flops":
        power = math.floor(math.log10(largest)) if largest > 0 else 0
        return 10.0**power, f"training FLOPs, {power_of_ten(power)}"
    if x == "num_tokens":
        return (1e6, "training tokens, millions") if largest >= 1e6 else (1e3, "training tokens, thousands")
    return (60.0, "training time, minutes") if largest >= 600 else (1.0, "training time, seconds")


def _frame(axes: Axes, curves: Sequence[np.ndarray], *, room: float) -> None:
    """Limits that show what follows the first fall, with room at the right for the labels."""
    from matplotlib.ticker import MaxNLocator

    end = max(curve[-1, 0] for curve in curves)
    values = np.concatenate([curve[curve[:, 0] >= LEFT_OUT * end, 1] for curve in curves])
    margin = 0.06 * (np.ptp(values) or 1.0)
    axes.set_xlim(0, room * end)
    axes.set_ylim(values.min() - margin, values.max() + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.001 * end])
    axes.spines["bottom"].set_bounds(0, end)
