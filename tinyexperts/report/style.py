"""The style of all figures: inline SVG drawn through matplotlib's objects, the same bytes for the same numbers.

Text stays text, so that the page's own font draws it. matplotlib is imported where it draws: it takes most of a second,
and training and serving draw nothing.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 470, 320  # of the drawing, in its own units; the page scales it
GREY, INK = "#8a8f98", "#30343b"
_STYLE = {
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
    """A drawn figure: its caption for readers, and its SVG with a text alternative."""

    caption: str
    svg: Markup


@contextmanager
def house_style() -> Iterator[None]:
    """Figures drawn inside look like all others."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure of the report's size with one frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.tick_params(length=3)
    return figure, axes


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """A label at the end of each curve, moved apart where they would overlap, and back as a group into the frame."""
    bottom, top = axes.get_ylim()
    gap = 0.065 * (top - bottom)
    ordered = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _, _ in ordered:
        heights.append(y if not heights else max(y, heights[-1] + gap))
    shift = (heights[-1] - ordered[-1][1]) / 2
    shift = min(shift, heights[0] - bottom)
    shift = max(shift, heights[-1] - top)
    right = max(x for x, *_ in ends)
    for (_, _, text, color), height in zip(ordered, heights, strict=True):
        axes.annotate(text, (right, height - shift), (9, 0), textcoords="offset points", va="center", color=color)


def svg_of(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an SVG element that scales with the page, its ids its own among other figures on the page."""
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
    return Markup(ET.tostring(root, encoding="unicode"))
