"""The figures of runs that are compared: held-out loss, the difference to a baseline, and the experts' use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyexperts.comparison.methods import label_of, look_of
from tinyexperts.comparison.paired import Comparison, interpolate
from tinyexperts.comparison.results import LayerUsage, Results
from tinyexperts.report.numbers import power_of_ten, signed
from tinyexperts.report.style import GREY, INK, Drawing, Plot, house_style

_AXES = {"training_flops": "training FLOPs", "num_tokens": "training tokens", "seconds": "seconds of training"}


# Name in the metrics -> the measure in words, its unit, the factor to it, and the digits of the labels.
_MEASURES = {
    "loss": ("held-out loss", "nats a token", 1, 2),
    "recall": ("recall of known facts", "%", 100, 1),
}


@house_style()
def training_curves(runs: Sequence[Results], x: str, measure: str = "loss") -> Drawing | None:
    """Draw a held-out measure during training; None where no run recorded two points.

    Each seed is a thin line, the mean of a method's seeds a bold one over the part of the axis that all its seeds
    cover. Mark and label show the mean of their ends.

    Args:
        runs (Sequence[Results]): the runs.
        x (str): the axis, `training_flops`, `num_tokens` or `seconds`.
        measure (str): `loss`, or `recall` of facts.
    """
    curves = {run: points for run in runs if len(points := _points(run, x, measure)) > 1}
    if not curves:
        return None
    words, unit, factor, digits = _MEASURES[measure]
    divisor, axis_label = _axis_scale(x, max(points[-1, 0] for points in curves.values()))
    curves = {run: points * (1 / divisor, factor) for run, points in curves.items()}
    plot = Plot(axis_label, f"{words}, {unit}")
    for method in dict.fromkeys(run.method for run in curves):
        look, seeds = look_of(method), [points for run, points in curves.items() if run.method == method]
        plot.mean_curve(plot.curves(seeds, look.color), look.color)
        end, value = np.mean([points[-1] for points in seeds], axis=0)
        plot.marks(end, value, look.color, look.marker, 6)
        plot.label_end(end, value, f"{look.label} {value:.{digits}f}", look.color)
    plot.frame(list(curves.values()), room=1.22)
    text = f"Line chart: {words} against {_AXES[x]}. It ends at {plot.reading}."
    return plot.drawing(f"{measure}-{x}", caption=f"{words.capitalize()} against {_AXES[x]}", text=text)


@house_style()
def difference_curves(comparison: Comparison) -> Drawing | None:
    """Draw held-out loss of a method minus the baseline's at equal training FLOPs, all along training."""
    look, baseline = look_of(comparison.method), label_of(comparison.baseline)
    curves = {
        ours.seed: points
        for ours, theirs in zip(comparison.ours.results, comparison.theirs.results, strict=True)
        if len(points := _difference(ours, theirs)) > 1 and np.isfinite(points).all()
    }
    if not curves:
        return None
    divisor, axis_label = _axis_scale("training_flops", max(points[-1, 0] for points in curves.values()))
    curves = {seed: points / (divisor, 1) for seed, points in curves.items()}
    plot = Plot(axis_label, f"{look.label} minus {baseline}, nats a token")
    plot.zero_line()
    mean = plot.curves(list(curves.values()), look.color, alpha=0.7)
    for seed, points in curves.items():
        plot.label_end(points[-1, 0], points[-1, 1], f"seed {seed} {signed(points[-1, 1])}", INK)
    if len(curves) > 1:
        plot.mean_curve(mean, look.color)
        plot.marks(mean[-1, 0], mean[-1, 1], look.color, look.marker, 6)
        plot.label_end(mean[-1, 0], mean[-1, 1], f"mean {signed(mean[-1, 1])}", look.color)
    zero = np.array([[points[-1, 0], 0.0] for points in curves.values()])
    plot.frame([*curves.values(), zero], room=1.32)
    what = f"held-out loss of {look.label} minus {baseline} at equal training FLOPs"
    return plot.drawing(
        f"difference-{comparison.method}",
        caption=f"{look.label} minus {baseline} at equal training FLOPs: below zero, {look.label} leads",
        text=f"Line chart: {what}. It ends at {plot.reading}.",
    )


@house_style()
def usage_histogram(run: Results, layer: LayerUsage) -> Drawing | None:
    """Draw experts by their share of the router weight in even shares (z_i N), on a log axis; unused ones apart."""
    if layer.expert_share is None or not (layer.expert_share > 0).any():
        return None
    relative_N = layer.expert_share * layer.expert_share.size
    exponents = np.log10(relative_N[relative_N > 0])
    bins = np.arange(4 * math.floor(exponents.min()), 4 * math.ceil(exponents.max() + 1e-9) + 1) / 4
    counts, _ = np.histogram(exponents, bins)
    height = 100 * float((relative_N == 0).mean())
    plot = Plot("router weight of an expert, in even shares", "experts, %")
    axes, span = plot.axes, bins[-1] - bins[0]
    shares = 100 * counts / relative_N.size
    axes.bar(bins[:-1], shares, width=0.25, align="edge", color=run.look.color, edgecolor="white")
    apart = bins[0] - 0.15 * span
    axes.bar(apart, height, width=0.08 * span, color=GREY)
    axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.16 * axes.get_ylim()[1])
    points: dict[str, Any] = {"textcoords": "offset points"}
    axes.annotate("even share", (0, 1), (4, -2), xycoords=("data", "axes fraction"), va="top", **points)
    axes.annotate(f"{height:.1f} %", (apart, height), (0, 3), ha="center", **points)
    step = max(1, math.ceil(span / 6))
    powers = range(int(bins[0]), int(bins[-1]) + 1, step)
    axes.set_xticks([apart, *powers], ["unused", *(power_of_ten(power) for power in powers)])
    text = (
        f"Histogram of {relative_N.size:,} experts by router weight: {height:.1f} percent unused, "
        f"the rest from {relative_N[relative_N > 0].min():.2g} to {relative_N.max():.3g} even shares."
    )
    caption = f"{run.look.label}, seed {run.seed}, layer {layer.layer}"
    return plot.drawing(f"usage-{run.name}-layer{layer.layer}", caption=caption, text=text)


def _points(run: Results, x: str, measure: str = "loss") -> np.ndarray:
    """Return [num_points, 2] of the axis and a held-out measure, without values that aren't finite."""
    points = np.array([(line[x], line[measure]) for line in run.validation if {x, measure} <= line.keys()], dtype=float)
    points = points.reshape(-1, 2)
    finite: np.ndarray = points[np.isfinite(points).all(axis=1)]
    return finite


def _difference(run: Results, twin: Results) -> np.ndarray:
    """Return [num_points, 2] of training FLOPs and the difference, at the run's points that the twin's curve covers.

    Budgets end on a whole step, so that one run may end just past the other.
    """
    twin_end = max((line["training_flops"] for line in twin.validation), default=0)
    points = [
        (flops, loss - other)
        for flops, loss in _points(run, "training_flops")
        if flops <= 1.01 * twin_end
        if (other := interpolate(twin.validation, "training_flops", min(flops, twin_end))) is not None
    ]
    return np.array(points, dtype=float).reshape(-1, 2)


def _axis_scale(x: str, largest: float) -> tuple[float, str]:
    """Return the divisor that makes an axis' ticks short numbers, and the axis' label."""
    if x == "training_flops":
        power = math.floor(math.log10(largest)) if largest > 0 else 0
        return 10.0**power, f"training FLOPs, {power_of_ten(power)}"
    if x == "num_tokens":
        return (1e6, "training tokens, millions") if largest >= 1e6 else (1e3, "training tokens, thousands")
    return (60.0, "training time, minutes") if largest >= 600 else (1.0, "training time, seconds")
