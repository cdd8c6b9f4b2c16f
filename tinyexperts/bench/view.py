"""The benchmark for readers: tables for the terminal, and the figure of time against the number of experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich import box
from rich.table import Table

from tinyexperts.bench.memory import GIB
from tinyexperts.bench.rivals import RIVALS
from tinyexperts.report.style import HEIGHT, WIDTH, house_style, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "-"
_Result = dict[str, Any]
# Colours of Okabe and Ito, as in the report's figures. Dense at equal time is left out: its time is ours.
_LINES = {
    "ours": ("tinyexperts", "#0072B2", "o"),
    "ours_row": ("tinyexperts, one 2nd moment a row", "#56B4E9", "o"),
    "reference": (RIVALS["reference"].label, "#009E73", "^"),
    "compiled_reference": (RIVALS["compiled_reference"].label, "#E69F00", "P"),
    "dense_equal_width": (RIVALS["dense_equal_width"].label, "#D55E00", "s"),
    "peer_pytorch_adam": (RIVALS["peer_pytorch_adam"].label, "#CC79A7", "D"),
    "peer_pytorch_sparse_adam": (RIVALS["peer_pytorch_sparse_adam"].label, "#5b5f66", "v"),
}
# The batch that the figure shows, where it was measured.
_FIGURE_TOKENS = 1024


def tables(results: Sequence[_Result]) -> list[Table]:
    """The operator alone, the layer in parts, and what stands beside it."""
    return [_operator_table(results), _layer_table(results), _rival_table(results)]


def figure(results: Sequence[_Result]) -> Markup:
    """Milliseconds of a forward pass and of a training step against N, a column a width, as an SVG element.

    Of the batch of 1,024 tokens, or the largest that was measured, on the fewest threads.
    """
    from matplotlib.figure import Figure

    threads = min(result["threads"] for result in results)
    sizes = {result["num_tokens"] for result in results}
    num_tokens = _FIGURE_TOKENS if _FIGURE_TOKENS in sizes else max(sizes)
    shown = [result for result in results if (result["threads"], result["num_tokens"]) == (threads, num_tokens)]
    widths = sorted({result["d_model"] for result in shown})
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
                of_width = sorted((r for r in shown if r["d_model"] == d_model), key=lambda r: r["num_experts"])
                for name, (label, color, marker) in _LINES.items():
                    points = [(r["num_experts"], y) for r in of_width if (y := _milliseconds(r, name, quantity))]
                    if points:
                        (lines[name],) = axes.plot(*zip(*points, strict=True), color=color, marker=marker)
                        size, time = points[-1]
                        readings.append(f"{quantity}, D = {d_model}, {label}: {_number(time)} ms at N = {_power(size)}")
                axes.set_title(f"{quantity}, D = {d_model}, M = {num_tokens:,}", fontsize=11.5, loc="left")
                _log_axes(axes, [r["num_experts"] for r in of_width])
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


def _milliseconds(result: _Result, line: str, quantity: str) -> float | None:
    """The median of a line at a setting; None where it was not measured."""
    layer, rival = result["layer"], result["rivals"].get(line, {})
    if quantity == "forward pass":
        if line == "peer_pytorch_sparse_adam":  # the same as with Adam
            return None
        found = layer["forward_seconds"] if line == "ours" else rival.get("forward_seconds")
    elif line.startswith("ours"):
        found = layer["steps"].get("row" if line == "ours_row" else "element", {}).get("step_seconds")
    else:
        found = rival.get("step", {}).get("step_seconds")
    return None if found is None else 1e3 * found["median"]


def _operator_table(results: Sequence[_Result]) -> Table:
    table = _table(
        "The experts' forward pass alone; ratios (embedding_bag: for E = 1): time over ours, median (quartiles)",
        [
            *_SETTING,
            "ids",
            "limit GB/s",
            "ms",
            "GB/s",
            "of the limit",
            "GFLOP/s",
            "plain torch",
            "embedding_bag, E = 1",
        ],
    )
    for result in results:
        for kind, operator in result["operator"].items():
            table.add_row(
                *_setting(result),
                kind,
                _number(operator["limit_gb_per_second"]),
                _ms(operator["forward_seconds"]),
                _number(operator["gb_per_second"]),
                _range(operator["share_of_limit"], percent=True),
                _number(operator["gflop_per_second"]),
                _range(operator["reference_forward_ratio"]),
                _range(operator["embedding_bag_forward_ratio"]),
            )
    return table


def _layer_table(results: Sequence[_Result]) -> Table:
    table = _table(
        "The layer, ms (router: queries, top-k of product keys, weights; % of the forward pass); "
        "update and step with a second moment an element / a row",
        [
            *_SETTING,
            "router",
            "of it top-k",
            "experts",
            "forward",
            "backward",
            "update",
            "step",
            "KiB kept/token",
            "peak GiB",
        ],
    )
    for result in results:
        layer = result["layer"]
        steps = [layer["steps"].get(moment, {}) for moment in ("element", "row")]
        kept, peak = layer["activation_bytes_per_token"], layer["peak_resident_bytes"]
        table.add_row(
            *_setting(result),
            *(
                f"{_ms(layer[f'{part}_forward_seconds'])} ({100 * layer['forward_shares'][part]['median']:.0f} %)"
                for part in ("router", "topk", "experts")
            ),
            _ms(layer["forward_seconds"]),
            _ms(next((step["backward_seconds"] for step in steps if step), None)),
            *(" / ".join(_ms(step.get(name)) for step in steps) for name in ("update_seconds", "step_seconds")),
            MISSING if kept is None else _number(kept / 1024),
            MISSING if peak is None else _number(peak / GIB),
        )
    return table


def _rival_table(results: Sequence[_Result]) -> Table:
    table = _table(
        "Beside it, in turns; ratios: its time over ours, median (quartiles); dense (hidden neurons)",
        [*_SETTING, "layer", "forward ms", "ratio", "step ms", "ratio", "KiB kept/token"],
    )
    for result in results:
        for name, rival in result["rivals"].items():
            hidden = f" ({rival['hidden_dim']:,})" if "hidden_dim" in rival else ""
            kept = rival.get("activation_bytes_per_token")
            table.add_row(
                *_setting(result),
                RIVALS[name].label + hidden,
                _ms(rival["forward_seconds"]),
                _range(rival["forward_ratio"]),
                _ms(rival.get("step", {}).get("step_seconds")),
                _range(rival.get("step_ratio")),
                MISSING if kept is None else _number(kept / 1024),
            )
    return table


_SETTING = ("D", "N", "M", "threads")


def _setting(result: _Result) -> tuple[str, ...]:
    return str(result["d_model"]), _power(result["num_experts"]), str(result["num_tokens"]), str(result["threads"])


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("ids", "layer") else "right", no_wrap=True)
    return table


def _ms(spread: dict[str, float] | None) -> str:
    return MISSING if spread is None else _number(1e3 * spread["median"])


def _range(spread: dict[str, float] | None, *, percent: bool = False) -> str:
    """Median (lower quartile-upper quartile)."""
    if spread is None:
        return MISSING
    scale, unit = (100, " %") if percent else (1, "")
    median = _number(scale * spread["median"])
    lower, upper = (_number(scale * spread[name], digits=2) for name in ("lower_quartile", "upper_quartile"))
    return f"{median}{unit} ({lower}-{upper})"


def _number(value: float, *, digits: int = 3) -> str:
    """So many digits, and all before the point: 0.0123, 4.56, 78.9, 1,235."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _power(size: int) -> str:
    """A power of two as 2^20, another number as it is."""
    return f"2^{size.bit_length() - 1}" if size.bit_count() == 1 else f"{size:,}"


def _superscript(size: int) -> str:
    base, _, exponent = _power(size).partition("^")
    return base + exponent.translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
