"""The style of all figures: inline SVG drawn through matplotlib's objects, the same bytes for the same numbers.

Text stays text, so that the page's own font draws it. matplotlib is imported where it draws: it takes most of a second,
and training and serving draw nothing.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from tinyexperts.report.numbers import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

WIDTH, HEIGHT = 470, 320  # of the drawing, in its own units; the page scales it
_MAP_HEIGHT = 150  # of a row of heat maps
GREY, INK, LINE = "#8a8f98", "#30343b", "#e4e6ea"
# Colors on a dark ground, for a page and for a figure in a file of its own.
_DARK = {
    f"fill: {INK}": "fill: #e3e6ea",
    f"stroke: {INK}": "stroke: #e3e6ea",
    f"stroke: {LINE}": "stroke: #333942",
    "stroke: #ffffff": "stroke: #14171c",
    "fill: #0072b2": "fill: #56b4e9",
    "stroke: #0072b2": "stroke: #56b4e9",
}
_DARK_RULES = " ".join(f'svg [style*="{light}"] {{ {dark} !important; }}' for light, dark in _DARK.items())
# A curve begins with its fall from chance; a frame that held this share of the axis would flatten the rest.
FALL = 0.3
# The share of an axis that the name of a tick takes at least.
_TICK_ROOM = 0.12
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tinyexperts",
    "font.size": 11.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A finished figure."""

    caption: str
    svg: Markup
    """The figure with its text alternative."""


@contextmanager
def house_style() -> Iterator[None]:
    """Give the figures drawn inside the style of all others."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


class Plot:
    """One figure under way, in house style: curves and marks, a label at the end of each, at last a drawing."""

    def __init__(self, x_label: str, y_label: str) -> None:
        from matplotlib.figure import Figure

        self._figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        self._figure.patch.set_alpha(0)
        self.axes: Axes = self._figure.add_subplot()
        self.axes.patch.set_alpha(0)
        self.axes.set(xlabel=x_label, ylabel=y_label)
        self.axes.grid(axis="y", color=LINE, linewidth=0.8)
        self.axes.tick_params(length=3)
        self._ends: list[tuple[float, float, str, str]] = []

    @property
    def reading(self) -> str:
        """The labels of the curves' ends in one line."""
        return ", ".join(text for *_, text, _ in self._ends)

    def label_end(self, x: float, y: float, text: str, color: str) -> None:
        """Put a label at the end of a curve."""
        self._ends.append((x, y, text, color))

    def zero_line(self) -> None:
        """Draw the line where two are equal."""
        self.axes.axhline(0, color=GREY, linewidth=1.2)

    def curves(self, curves: Sequence[np.ndarray], color: str, *, alpha: float = 0.55) -> np.ndarray:
        """Draw a thin curve for each seed, and return their mean over the part of the axis that all cover."""
        for curve in curves:
            self.axes.plot(curve[:, 0], curve[:, 1], color=color, linewidth=0.9, alpha=alpha)
        x = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
        x = x[(x >= max(curve[0, 0] for curve in curves)) & (x <= min(curve[-1, 0] for curve in curves))]
        return np.column_stack([x, np.mean([np.interp(x, curve[:, 0], curve[:, 1]) for curve in curves], axis=0)])

    def mean_curve(self, mean: np.ndarray, color: str) -> None:
        """Draw the bold curve of a mean."""
        self.axes.plot(mean[:, 0], mean[:, 1], color=color, linewidth=2.4)

    def marks(self, x: ArrayLike, y: ArrayLike, color: str, marker: str, size: float, **style: Any) -> None:
        """Draw marks without a line."""
        self.axes.plot(x, y, linestyle="", marker=marker, markersize=size, color=color, **style)

    def means(self, x: ArrayLike, seeds: Sequence[Sequence[float]], means: Sequence[float], **style: Any) -> None:
        """Draw a line through means, and a small mark for each seed.

        Args:
            x (ArrayLike): the positions.
            seeds (Sequence[Sequence[float]]): the values of the seeds at each position.
            means (Sequence[float]): their means.
            style (Any): the style of the line.
        """
        self.axes.plot(x, means, **style)
        for position, values in zip(np.atleast_1d(x), seeds, strict=True):
            self.marks([position] * len(values), values, style["color"], style.get("marker", "o"), 3, alpha=0.6)

    def log_x(self, values: np.ndarray, *, room: float) -> None:
        """Make the axis logarithmic, with ticks at the values that leave room for their names."""
        axes = self.axes
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

    def frame(self, curves: Sequence[np.ndarray], *, room: float) -> None:
        """Set limits that show what follows the first fall, with room at the right for the labels."""
        from matplotlib.ticker import MaxNLocator

        axes, end = self.axes, max(curve[-1, 0] for curve in curves)
        values = np.concatenate([curve[curve[:, 0] >= FALL * end, 1] for curve in curves])
        margin = 0.06 * (np.ptp(values) or 1.0)
        axes.set_xlim(0, room * end)
        axes.set_ylim(values.min() - margin, values.max() + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xticks([float(tick) for tick in axes.get_xticks() if 0 <= tick <= 1.001 * end])
        axes.spines["bottom"].set_bounds(0, end)

    def drawing(self, name: str, *, caption: str, text: str) -> Drawing:
        """Finish the figure.

        Args:
            name (str): the start of its ids on the page.
            caption (str): the caption.
            text (str): the alternative for those who can't see it.
        """
        if self._ends:
            self._draw_labels()
        return Drawing(caption=caption, svg=svg_of(self._figure, name, text))

    def _draw_labels(self) -> None:
        """Move the labels apart where they would overlap, and back as a group into the frame."""
        bottom, top = self.axes.get_ylim()
        gap = 0.065 * (top - bottom)
        ordered = sorted(self._ends, key=lambda end: end[1])
        heights: list[float] = []
        for _, y, _, _ in ordered:
            heights.append(y if not heights else max(y, heights[-1] + gap))
        shift = (heights[-1] - ordered[-1][1]) / 2
        shift = min(shift, heights[0] - bottom)
        shift = max(shift, heights[-1] - top)
        right = max(x for x, *_ in self._ends)
        for (_, _, text, color), height in zip(ordered, heights, strict=True):
            at, offset = (right, height - shift), (9, 0)
            self.axes.annotate(text, at, offset, textcoords="offset points", va="center", color=color)


class HeatMaps:
    """Small heat maps of percentages side by side, in house style; a cell without a number is empty."""

    def __init__(
        self,
        maps: Mapping[str, np.ndarray],
        *,
        x_label: str,
        y_label: str,
        x_names: Sequence[str],
        y_names: Sequence[str],
        columns: int,
    ) -> None:
        """Draw them.

        Args:
            maps (Mapping[str, np.ndarray]): the percentages (float64 [rows, columns], NaN for none), by title.
            x_label (str): what the columns are.
            y_label (str): what the rows are.
            x_names (Sequence[str]): the name of each column.
            y_names (Sequence[str]): the name of each row.
            columns (int): maps beside each other.
        """
        from matplotlib.figure import Figure

        columns = min(columns, len(maps))
        rows = -(-len(maps) // columns)
        self._figure = Figure(figsize=(WIDTH / 72, rows * _MAP_HEIGHT / 72), layout="constrained")
        self._figure.patch.set_alpha(0)
        grid = self._figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        most = max(float(np.nanmax(values)) for values in maps.values()) or 1.0
        for axes in grid.flat[len(maps) :]:
            axes.set_visible(False)
        for axes, (title, values) in zip(grid.flat, maps.items(), strict=False):
            axes.patch.set_alpha(0)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0, labelsize=8)
            axes.set_title(title, fontsize=8.5, color=INK)
            axes.pcolormesh(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=1.15 * most, edgecolors="none")
            for (row, column), value in np.ndenumerate(values):
                if math.isfinite(value):
                    ink = "#fdfdfd" if value > 0.6 * most else "#101418"
                    place = (column + 0.5, row + 0.5)
                    axes.annotate(f"{value:.0f}", place, ha="center", va="center", fontsize=7.5, color=ink)
            axes.set_xticks(np.arange(len(x_names)) + 0.5, x_names)
            axes.set_yticks(np.arange(len(y_names)) + 0.5, y_names)
        grid[0, 0].set_ylim(len(y_names), 0)
        self._figure.supxlabel(x_label, fontsize=9.5, color=INK)
        self._figure.supylabel(y_label, fontsize=9.5, color=INK)

    def drawing(self, name: str, *, caption: str, text: str) -> Drawing:
        """Finish the figure, as Plot.drawing does."""
        return Drawing(caption=caption, svg=svg_of(self._figure, name, text))


def svg_of(figure: Figure, name: str, description: str) -> Markup:
    """Return a figure as an SVG element that scales with the page.

    Args:
        figure (Figure): the figure.
        name (str): the start of its ids, which other figures of the page don't share.
        description (str): the alternative for those who can't see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ET.register_namespace("", "http://www.w3.org/2000/svg")
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(buffer.getvalue())
    svg = "{http://www.w3.org/2000/svg}"
    prefix = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style element would apply to the whole page, and its metadata says nothing to a reader.
            if child.tag in (f"{svg}metadata", f"{svg}style"):
                parent.remove(child)
        for key, value in parent.attrib.items():
            if key == "id":
                parent.set(key, f"{prefix}-{value}")
            elif key.endswith("href"):
                parent.set(key, value.replace("#", f"#{prefix}-"))
            elif "url(#" in value:
                parent.set(key, value.replace("url(#", f"url(#{prefix}-"))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", description)
    style = ET.Element(f"{svg}style")
    style.text = f"@media (prefers-color-scheme: dark) {{ {_DARK_RULES} }}"
    root.insert(0, style)
    return Markup(ET.tostring(root, encoding="unicode"))
