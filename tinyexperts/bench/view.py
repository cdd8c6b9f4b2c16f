"""The benchmark for readers: tables for the terminal, and the figure of time against the number of experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup
from rich import box
from rich.table import Table

from tinyexperts.bench.baselines import BASELINES
from tinyexperts.bench.measurement import Measurement
from tinyexperts.bench.memory import GIB
from tinyexperts.bench.timing import Spread
from tinyexperts.report.numbers import MISSING
from tinyexperts.report.style import HEIGHT, WIDTH, house_style, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colors, as in the report's figures. Dense at equal time is left out: its time is ours.
_LINES = {
    "ours": ("tinyexperts", "#0072B2", "o"),
    "ours_row": ("tinyexperts, one 2nd moment a row", "#56B4E9", "o"),
    "reference": (BASELINES["reference"].label, "#009E73", "^"),
    "compiled_reference": (BASELINES["compiled_reference"].label, "#E69F00", "P"),
    "dense_equal_width": (BASELINES["dense_equal_width"].label, "#D55E00", "s"),
    "peer_pytorch_adam": (BASELINES["peer_pytorch_adam"].label, "#CC79A7", "D"),
    "peer_pytorch_sparse_adam": (BASELINES["peer_pytorch_sparse_adam"].label, "#5b5f66", "v"),
}
# The lines of our layer, by the second moment of their steps.
_OUR_STEPS = {"ours": "element", "ours_row": "row"}
# The batch that the figure shows, where it was measured.
_FIGURE_TOKENS = 1024


def tables(measurements: Sequence[Measurement]) -> list[Table]:
    """Return tables of the operator alone, of the layer in parts, and of its baselines."""
    return [_operator_table(measurements), _layer_table(measurements), _baseline_table(measurements)]


def figure(measurements: Sequence[Measurement]) -> Markup:
    """Draw milliseconds of a forward pass and of a training step against N, a column a width, as an SVG element.

    The batch is that of 1,024 tokens, or else the largest that was measured, on the fewest threads.
    """
    from matplotlib.figure import Figure

    threads = min(each.threads for each in measurements)
    sizes = {each.num_tokens for each in measurements}
    num_tokens = _FIGURE_TOKENS if _FIGURE_TOKENS in sizes else max(sizes)
    shown = [each for each in measurements if (each.threads, each.num_tokens) == (threads, num_tokens)]
    widths = sorted({each.d_model for each in shown})
    quantities = ("forward pass", "training step") if num_tokens > 1 else ("forward pass",)
    legend_columns = 2 if len(widths) == 1 else 3
    legend_height = 22 * math.ceil(len(_LINES) / legend_columns)
    with house_style():
        size = (len(widths) * WIDTH / 72, (len(quantities) * HEIGHT + legend_height) / 72)
        drawing = Figure(figsize=size, layout="constrained")
        drawing.patch.set_alpha(0)
        grid = drawing.subplots(len(quantities), len(widths), squeeze=False)
        lines, readings = {}, []
        for row, quantity in zip(grid, quantities, strict=True):
            for axes, d_model in zip(row, widths, strict=True):
                of_width = sorted((m for m in shown if m.d_model == d_model), key=lambda m: m.num_experts)
                for name, (label, color, marker) in _LINES.items():
                    points = [(m.num_experts, y) for m in of_width if (y := _milliseconds(m, name, quantity))]
                    if points:
                        (lines[name],) = axes.plot(*zip(*points, strict=True), color=color, marker=marker)
                        most, time = points[-1]
                        readings.append(f"{quantity}, D = {d_model}, {label}: {_number(time)} ms at N = {_power(most)}")
                axes.set_title(f"{quantity}, D = {d_model}, M = {num_tokens:,}", fontsize=11.5, loc="left")
                _log_axes(axes, [m.num_experts for m in of_width])
            row[0].set_ylabel("milliseconds")
        named = {_LINES[name][0]: lines[name] for name in _LINES if name in lines}
        drawing.legend(named.values(), named.keys(), loc="outside upper left", ncols=legend_columns, frameon=False)
        description = (
            f"Line charts: milliseconds against the number of experts, {num_tokens} tokens, CPU threads: {threads}. "
            f"At the most experts each was measured with: {'; '.join(readings)}."
        )
        return svg_of(drawing, "layer-benchmark", description)


def _log_axes(axes: Axes, sizes: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator

    axes.patch.set_alpha(0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("experts N")
    axes.set_xticks(sizes, [_superscript(size) for size in sizes], minor=False)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)


def _milliseconds(measurement: Measurement, line: str, quantity: str) -> float | None:
    """Return the median of a line at a setting; None where it was not measured."""
    layer, baseline = measurement.layer, measurement.baselines.get(line)
    if quantity == "training step":
        step = layer.steps.get(_OUR_STEPS[line]) if line in _OUR_STEPS else baseline.step if baseline else None
        return 1e3 * step.step_seconds.median if step else None
    if line == "ours":
        return 1e3 * layer.forward_seconds.median
    # SparseAdam's forward pass is that of Adam.
    return 1e3 * baseline.forward_seconds.median if baseline and line != "peer_pytorch_sparse_adam" else None


def _operator_table(measurements: Sequence[Measurement]) -> Table:
    table = _table(
        "The experts' forward pass alone; ratios (embedding_bag: for E = 1): time over ours, median (quartiles)",
        ("ids", "limit GB/s", "ms", "GB/s", "of the limit", "GFLOP/s", "plain torch", "embedding_bag, E = 1"),
    )
    for measurement in measurements:
        for kind, operator in measurement.operator.items():
            table.add_row(
                *_setting(measurement),
                kind,
                _number(operator.limit_gb_per_second),
                _ms(operator.forward_seconds),
                _number(operator.gb_per_second),
                _range(operator.share_of_limit, percent=True),
                _number(operator.gflop_per_second),
                _range(operator.reference_forward_ratio),
                _range(operator.embedding_bag_forward_ratio),
            )
    return table


def _layer_table(measurements: Sequence[Measurement]) -> Table:
    table = _table(
        "The layer, ms (router: queries, top-k of product keys, weights; % of the forward pass); "
        "update and step with a second moment an element / a row",
        (
            *("router", "of it top-k", "experts", "forward", "backward", "update", "step"),
            *("KiB kept/token", "peak GiB"),
        ),
    )
    for measurement in measurements:
        layer = measurement.layer
        steps = [layer.steps.get(moment) for moment in ("element", "row")]
        parts = {
            "router": layer.router_forward_seconds,
            "topk": layer.topk_forward_seconds,
            "experts": layer.experts_forward_seconds,
        }
        table.add_row(
            *_setting(measurement),
            *(f"{_ms(seconds)} ({100 * layer.forward_shares[part].median:.0f} %)" for part, seconds in parts.items()),
            _ms(layer.forward_seconds),
            _ms(next((step.backward_seconds for step in steps if step), None)),
            " / ".join(_ms(step.update_seconds if step else None) for step in steps),
            " / ".join(_ms(step.step_seconds if step else None) for step in steps),
            _in_units(layer.activation_bytes_per_token, 1024),
            _in_units(layer.peak_resident_bytes, GIB),
        )
    return table


def _baseline_table(measurements: Sequence[Measurement]) -> Table:
    table = _table(
        "Its baselines, in turns; ratios: their time over ours, median (quartiles); dense (hidden neurons)",
        ("layer", "forward ms", "ratio", "step ms", "ratio", "KiB kept/token"),
    )
    for measurement in measurements:
        for name, baseline in BASELINES.items():
            if (measured := measurement.baselines.get(name)) is None:
                continue
            hidden = f" ({measured.hidden_dim:,})" if measured.hidden_dim else ""
            table.add_row(
                *_setting(measurement),
                baseline.label + hidden,
                _ms(measured.forward_seconds),
                _range(measured.forward_ratio),
                _ms(measured.step.step_seconds if measured.step else None),
                _range(measured.step_ratio),
                _in_units(measured.activation_bytes_per_token, 1024),
            )
    return table


_SETTING = ("D", "N", "M", "threads")


def _setting(measurement: Measurement) -> tuple[str, ...]:
    sizes = measurement.num_tokens, measurement.threads
    return str(measurement.d_model), _power(measurement.num_experts), *map(str, sizes)


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in (*_SETTING, *columns):
        table.add_column(column, justify="left" if column in ("ids", "layer") else "right", no_wrap=True)
    return table


def _ms(seconds: Spread | None) -> str:
    return MISSING if seconds is None else _number(1e3 * seconds.median)


def _in_units(num_bytes: float | None, unit: int) -> str:
    return MISSING if num_bytes is None else _number(num_bytes / unit)


def _range(spread: Spread | None, *, percent: bool = False) -> str:
    """Write median (lower quartile-upper quartile)."""
    if spread is None:
        return MISSING
    scale, unit = (100, " %") if percent else (1, "")
    median = _number(scale * spread.median)
    lower, upper = (_number(scale * value, digits=2) for value in (spread.lower_quartile, spread.upper_quartile))
    return f"{median}{unit} ({lower}-{upper})"


def _number(value: float, *, digits: int = 3) -> str:
    """Write this many digits, and all before the point: 0.0123, 4.56, 78.9, 1,235."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _power(size: int) -> str:
    """Write a power of two as 2^20, another number as it is."""
    return f"2^{size.bit_length() - 1}" if size.bit_count() == 1 else f"{size:,}"


def _superscript(size: int) -> str:
    base, _, exponent = _power(size).partition("^")
    return base + exponent.translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
