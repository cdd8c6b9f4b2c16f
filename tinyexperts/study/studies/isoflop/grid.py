"""The grid of the isoFLOP study: each method's tuning, then every width and budget with what the tuning chose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from tinyexperts.comparison.methods import method_named
from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.scales import Scale

# What a method's tuning changes, one at a time, by which factors; dense is tuned as hard as the others. Where a factor
# wins, its square is tried, too, and so on while the last power is the best.
_TUNED_WITHOUT_TABLE = (
    "optimizer.matrix_learning_rate",
    "optimizer.embedding_learning_rate",
    "optimizer.head_learning_rate",
    "batch_size",
)
_TUNED = (*_TUNED_WITHOUT_TABLE, "optimizer.table_learning_rate")
_FACTORS = (0.5, 2.0)
MAX_POWER = 6


def stages(scale: Scale) -> tuple[Stage, ...]:
    """Return the stages: tuning, the squares of the factors that won, every width and budget, the last budget."""

    def tune(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            _tuning_run(scale, method, label, **changes)
            for method in scale.layers
            for label, changes in _variants(scale, method, _FACTORS)
        ]

    def measure(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            run
            for budget, widths in scale.widths.items()
            for run in runs_at(scale, budget, dict.fromkeys(scale.layers, widths), losses)
        ]

    def extend(losses: Mapping[str, float]) -> list[GridRun]:
        if scale.last_budget is None:
            return []
        best = {method: _best_settings(scale, method, losses) for method in scale.layers}
        return [
            _run(scale, method, width=width, budget=scale.last_budget, seed=seed, **best[method])
            for seed in scale.seeds
            for method in scale.layers
            if (width := best_width(scale, method, losses, scale.budgets[-1])) is not None
        ]

    return tune, tuned_on(scale, 2), measure, extend


def tuned_on(scale: Scale, power: int) -> Stage:
    """Return the stage of the next power of each factor whose last one is the best of its setting.

    Args:
        scale (Scale): the scale.
        power (int): the power, from 2 to MAX_POWER.
    """

    def tune_further(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            _tuning_run(scale, method, label, **changes)
            for method in scale.layers
            for label, changes in _further_variants(scale, method, losses, power)
        ]

    return tune_further


def runs_at(
    scale: Scale, budget: float, widths: Mapping[str, Sequence[int]], losses: Mapping[str, float]
) -> list[GridRun]:
    """Return the runs of every seed at a budget, with the settings that the tuning chose.

    Args:
        scale (Scale): the scale.
        budget (float): training FLOPs.
        widths (Mapping[str, Sequence[int]]): the model widths D of each method.
        losses (Mapping[str, float]): the losses of the finished runs (nats a token) by name.
    """
    best = {method: _best_settings(scale, method, losses) for method in widths}
    return [
        _run(scale, method, width=width, budget=budget, seed=seed, **best[method])
        for seed in scale.seeds
        for width in sorted(set().union(*widths.values()))
        for method in widths
        if width in widths[method]
    ]


def _variants(scale: Scale, method: str, factors: Sequence[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the default, and each setting changed alone; dense and mixtures have no table."""
    yield "default", {}
    for setting in _TUNED if method_named(method).has_table else _TUNED_WITHOUT_TABLE:
        for factor in factors:
            label, value = _changed(scale, setting, factor)
            if value != attrgetter(setting)(scale.base):
                yield label, {setting: value}


def _changed(scale: Scale, setting: str, factor: float) -> tuple[str, float]:
    """Return the label and the value of a setting times a factor."""
    value = attrgetter(setting)(scale.base) * factor
    name = setting.removeprefix("optimizer.").removesuffix("_learning_rate").removesuffix("_size")
    return f"{name}-x{factor:g}", max(1, round(value)) if setting == "batch_size" else value


def _further_variants(
    scale: Scale, method: str, losses: Mapping[str, float], power: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a power of the factors of which the power before is the best of their settings."""
    for setting, best in _best_settings(scale, method, losses).items():
        for factor in _FACTORS:
            label, value = _changed(scale, setting, factor**power)
            if _changed(scale, setting, factor ** (power - 1))[1] == best and value != best:
                yield label, {setting: value}


def _best_settings(scale: Scale, method: str, losses: Mapping[str, float]) -> dict[str, Any]:
    """Return the value of least loss of each setting; a tuning run that is missing is no best."""

    def loss(label: str) -> float:
        value = losses.get(f"{_tuning_stem(method, label)}-seed0", math.inf)
        return value if math.isfinite(value) else math.inf

    default = loss("default")
    best: dict[str, float] = {}
    chosen: dict[str, Any] = {}
    tried = [factor**power for power in range(1, MAX_POWER + 1) for factor in _FACTORS]
    for label, changes in _variants(scale, method, tried):
        for setting, value in changes.items():
            if loss(label) < best.get(setting, default):
                best[setting], chosen[setting] = loss(label), value
    return chosen


def losses_by_width(scale: Scale, method: str, losses: Mapping[str, float], budget: float) -> dict[int, float]:
    """Return the mean losses of the widths of which all seeds have ended at a budget, by width, ascending.

    Args:
        scale (Scale): the scale.
        method (str): the name of the method.
        losses (Mapping[str, float]): the losses of the finished runs (nats a token) by name.
        budget (float): training FLOPs, one of the scale's budgets.
    """
    means = {}
    for width in scale.widths[budget]:
        stem = _main_stem(method, width, budget)
        mean = math.fsum(losses.get(f"{stem}-seed{seed}", math.inf) for seed in scale.seeds) / len(scale.seeds)
        if math.isfinite(mean):
            means[width] = mean
    return means


def best_width(scale: Scale, method: str, losses: Mapping[str, float], budget: float) -> int | None:
    """Return the width of least mean loss at a budget; None where no width's seeds have all ended (losses_by_width)."""
    means = losses_by_width(scale, method, losses, budget)
    return min(means, key=lambda width: means[width], default=None)


def tuned_run(
    scale: Scale, method: str, *, width: int, budget: float, seed: int, stage: str, losses: Mapping[str, float]
) -> GridRun:
    """Return a run of a method with the settings that its tuning chose, in a stage of another name.

    Args:
        scale (Scale): the scale.
        method (str): the name of the method.
        width (int): the model width D.
        budget (float): training FLOPs.
        seed (int): the seed.
        stage (str): the name of the stage, the run's axis `stage`.
        losses (Mapping[str, float]): the losses of the finished runs (nats a token) by name.
    """
    run = _run(scale, method, width=width, budget=budget, seed=seed, **_best_settings(scale, method, losses))
    return replace(run, axes={**run.axes, "stage": stage})


def _tuning_run(scale: Scale, method: str, label: str, **changes: Any) -> GridRun:
    return _run(scale, method, width=scale.middle_width, budget=scale.tuning_budget, seed=0, tuning=label, **changes)


def _run(
    scale: Scale, method: str, *, width: int, budget: float, seed: int, tuning: str | None = None, **changes: Any
) -> GridRun:
    config = scale.config(scale.layers[method], width=width, budget=budget, seed=seed, **changes)
    stem = _tuning_stem(method, tuning) if tuning else _main_stem(method, width, budget)
    axes: dict[str, Any] = {"stage": "tuning" if tuning else "main", "budget": budget, "width": width, "seed": seed}
    return GridRun(name=f"{stem}-seed{seed}", method=method, axes=axes, config=config)


def _tuning_stem(method: str, label: str) -> str:
    """Return the name of a tuning run, without its seed."""
    return f"tune-{method}-{label}"


def _main_stem(method: str, width: int, budget: float) -> str:
    """Return the name of a run of a width and a budget, without its seed."""
    return f"{method}-d{width}-c{budget:.2g}".replace("+", "")
