"""The tables of benchmarks/peer_packages.py in Markdown, from the numbers in its files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peer_package_parts.facts import METHODS
from tinyexperts.report.numbers import format_count, signed
from tinyexperts.statistics.seed_interval import SeedInterval, paired_difference


def exactness_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the shares of the true top-k; one number where all kinds of queries give the same."""
    ks = sorted({found["k"] for found in results})
    rows: dict[tuple[str, ...], list[int]] = {}
    for label in dict.fromkeys(found["layer"] for found in results):
        for num_experts in dict.fromkeys(found["num_experts"] for found in results):
            shares = {
                found["k"]: list(found["shares"].values())
                for found in results
                if (found["layer"], found["num_experts"]) == (label, num_experts)
            }
            rows.setdefault((label, *(_shares(shares[k]) for k in ks)), []).append(num_experts)
    lines = [(cells[0], _powers(numbers), *cells[1:]) for cells, numbers in rows.items()]
    return _table(("layer", "N", *(f"k = {k}" for k in ks)), lines)


def speed_tables(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the ratios of forward passes and of training steps; above 1 ours is faster."""
    numbers = sorted({found["num_tokens"] for found in results})
    parts = []
    for kind, title in (("forward", "Forward pass, without gradients"), ("step", "Training step")):
        rows = []
        for num_experts in dict.fromkeys(found["num_experts"] for found in results):
            for label in dict.fromkeys(found["layer"] for found in results):
                if kind == "forward" and label.endswith("SparseAdam"):  # the same forward pass again
                    continue
                chosen = {
                    found["num_tokens"]: found[kind]
                    for found in results
                    if (found["layer"], found["num_experts"]) == (label, num_experts)
                }
                name = label.partition(";")[0] if kind == "forward" else label
                rows.append((_powers([num_experts]), name, *(_ratio(chosen[number]) for number in numbers)))
        heads = (f"M = {number:,}" for number in numbers)
        parts.append(f"{title}:\n\n{_table(('N', 'layer', *heads), rows)}")
    return "\n".join(parts)


def memory_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the memory of training."""
    mib = 2**20
    return _table(
        (
            "layer",
            "weights, MiB",
            "optimizer, MiB",
            "kept for the backward pass, KiB a token",
            "peak of a step, MiB",
            "the table's gradient",
        ),
        [
            (
                found["layer"],
                f"{found['weights_bytes'] / mib:,.0f}",
                f"{found['state_bytes'] / mib:,.0f}",
                f"{found['activation_bytes_per_token'] / 1024:.1f}",
                f"{found['peak_of_step_bytes'] / mib:,.0f}",
                found["table_gradient"],
            )
            for found in results
        ],
    )


def facts_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the losses on facts: means over seeds, and the difference to PEER of tinyexperts with its interval."""
    ours = _by_seed(results["peer"], "nats_per_fact")
    rows = []
    for name, found in results.items():
        method, runs = METHODS[name], found["runs"]
        first, nats = runs[0], _by_seed(found, "nats_per_fact")
        rows.append(
            (
                method.label,
                f"{method.rate_of}: {' '.join(_rate(each, first['rate']) for each in found['tuning'])}",
                f"{first['num_steps']:,}",
                f"{first['training_flops']:.3g}",
                f"{format_count(first['active_parameters'])} / {format_count(first['total_parameters'])}",
                _mean(nats.values(), 2),
                "" if name == "peer" else _difference(nats, ours),
                _mean((100 * value for value in _by_seed(found, "recall").values()), 1),
                _mean(_by_seed(found, "loss").values(), 3),
            )
        )
    heads = (
        *("layer", "rates tried (nats a fact); **taken**", "steps", "training FLOPs", "active / total parameters"),
        *("nats a fact", "less tinyexperts PEER's", "recall, %", "loss, nats a token"),
    )
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shares(shares: Sequence[float]) -> str:
    cells = [f"{100 * share:.4g}" for share in shares]
    return f"{cells[0]} %" if len(set(cells)) == 1 else f"{' / '.join(cells)} %"


def _powers(numbers: Sequence[int]) -> str:
    return ", ".join(
        f"2^{number.bit_length() - 1}" if number & (number - 1) == 0 else f"{number:,}" for number in numbers
    )


def _ratio(found: Mapping[str, Any]) -> str:
    ratio = found["ratio"]
    seconds = " / ".join(_milliseconds(found[name]["median"]) for name in ("seconds", "our_seconds"))
    return f"**{ratio['median']:.2f}** ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}); {seconds}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _by_seed(found: Mapping[str, Any], measure: str) -> dict[int, float]:
    """Return a measure by seed; a run that diverged has an infinite loss, and knows nothing."""
    missing = 0.0 if measure == "recall" else float("inf")
    return {run["seed"]: missing if run[measure] is None else run[measure] for run in found["runs"]}


def _rate(run: Mapping[str, Any], taken: float) -> str:
    nats = "diverged" if run["nats_per_fact"] is None else f"{run['nats_per_fact']:.2f}"
    rate = f"{run['rate']:g} ({nats})"
    return f"**{rate}**" if run["rate"] == taken else rate


def _mean(values: Iterable[float], digits: int) -> str:
    interval = SeedInterval(values=tuple(values))
    deviation = interval.standard_deviation
    return f"{interval.mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _difference(nats: Mapping[int, float], ours: Mapping[int, float]) -> str:
    difference = paired_difference(nats, ours)
    assert difference is not None
    low, high = difference.bounds
    return f"{signed(difference.mean, 2)} ({signed(low, 2)} to {signed(high, 2)})"
