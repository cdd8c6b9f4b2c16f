"""The figures of the explorer: the S x S grid of use, and the losses of facts without experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tinyexperts.evaluation import ExpertUsage
from tinyexperts.explorer.knock_out import KnockOut, LossRise
from tinyexperts.report.style import INK, Drawing, Plot, house_style
from tinyexperts.statistics.seed_interval import SeedInterval

# Pixels of a side of the grid's picture at most; more would make the page large and show nothing.
MOST_PIXELS = 256
# Okabe and Ito's colors, with a marker each, for the experts of questions.
_LOOKS = (("#d55e00", "o"), ("#009e73", "s"), ("#cc79a7", "^"), ("#e69f00", "D"), ("#56b4e9", "v"), (INK, "x"))
_USE, _OWN, _OTHERS = (0.0, 0.447, 0.698), "#d55e00", "#0072b2"
# The use, in even shares, from which the color is full.
_FULL = 100.0


def experts_per_pixel(num_experts: int) -> int:
    """Return the side of the square of experts that a pixel shows."""
    return math.ceil(math.isqrt(num_experts) / MOST_PIXELS)


def binned(share: np.ndarray) -> np.ndarray:
    """Return the use of an S x S grid of experts in even shares, the mean over the square that each pixel shows.

    Args:
        share (fp64, [N]): the share of the router weight by expert.
    """
    side, block = math.isqrt(len(share)), experts_per_pixel(len(share))
    starts = np.arange(0, side, block)
    sums = np.add.reduceat(np.add.reduceat(share.reshape(side, side), starts, 0), starts, 1)
    sizes = np.minimum(starts + block, side) - starts
    mean: np.ndarray = len(share) * sums / np.outer(sizes, sizes)
    return mean


@house_style()
def use_grid(layer: str, usage: ExpertUsage, marked: Sequence[Sequence[int]]) -> Drawing:
    """Draw the grid of a layer's experts by their use, with the experts of questions marked.

    Args:
        layer (str): the layer's name.
        usage (ExpertUsage): the use of its experts.
        marked (Sequence[Sequence[int]]): the experts' ids by question.
    """
    side = math.isqrt(usage.num_experts)
    even = binned(usage.share.numpy())
    least = 1 / _FULL
    depth = np.clip(np.log(np.maximum(even, least) / least) / np.log(_FULL / least), 0, 1)
    image = np.empty((*even.shape, 4))
    image[..., :3] = _USE
    image[..., 3] = np.where(even > 0, 0.1 + 0.9 * depth, 0)  # unused: the page's own ground, light or dark
    plot = Plot("second sub-key of the expert", "first sub-key")
    plot.axes.grid(visible=False)
    plot.axes.imshow(image, extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="none")
    for number, ids in enumerate(marked):
        color, marker = _LOOKS[number % len(_LOOKS)]
        rows, columns = np.divmod(np.array(ids, dtype=int), side)
        plot.marks(columns, rows, color, marker, 6, fillstyle="none", label=f"question {number + 1}")
    if marked:
        plot.axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0)
    text = (
        f"Grid of {side} by {side} experts of {layer}, darker the more they are used: {usage.usage:.1%} are used, with "
        f"from {even[even > 0].min(initial=math.inf):.2g} to {even.max():.3g} even shares a pixel."
    )
    return plot.drawing(f"grid-{layer}", caption=f"Use of the experts of {layer}", text=text)


@house_style()
def knock_out_curves(found: KnockOut) -> Drawing:
    """Draw the rise of losses against the number of experts that are knocked out, with 95 % intervals over facts."""
    plot = Plot("experts knocked out", "rise of the loss of an answer, nats")
    sides: Mapping[str, tuple[LossRise, str]] = {"fired": (found.fired, "-"), "random": (found.drawn, "--")}
    for name, (rise, line) in sides.items():
        for what, values, color, shift in (("own", rise.own, _OWN, 1.0), ("others", rise.others, _OTHERS, 1.05)):
            intervals = [SeedInterval(values=tuple(row)) for row in values.tolist()]
            means = np.array([interval.mean for interval in intervals])
            halves = [interval.bounds[1] - interval.mean for interval in intervals]
            x = shift * np.array(found.counts)
            plot.axes.errorbar(x, means, halves, color=color, linestyle=line, marker="o", markersize=4, capsize=3)
            plot.label_end(x[-1], means[-1], f"{name}, {what}", color)
    low, high = plot.axes.get_ylim()
    plot.axes.set_ylim(low - 0.1 * (high - low), high)  # room for the labels of curves near zero
    plot.log_x(np.array(found.counts, dtype=float), room=2.6)
    text = (
        "Line chart: rise of the loss of a fact's answer and of other facts' answers without the experts that fire "
        f"most for it, and without random ones. With {found.counts[-1]} experts knocked out: "
        + ", ".join(
            f"{name}: own {rise.own[-1].mean():+.2f}, others {rise.others[-1].mean():+.2f} nats"
            for name, (rise, _) in sides.items()
        )
        + "."
    )
    return plot.drawing("knock-out", caption="Facts without the experts that fire for them", text=text)
