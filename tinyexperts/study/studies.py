"""The studies: the paper's figures and tables as grids of runs, and three that it leaves open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tinyexperts.study.scales import Scale
from tinyexperts.study.study import GridRun, Study
from tinyexperts.training.config import TrainConfig

# What a method's tuning changes, one at a time, by which factors; dense is tuned as hard as the others. Where a factor
# wins, its square is tried, too.
_TUNED_WITHOUT_TABLE = ("matrix_learning_rate", "embedding_learning_rate", "head_learning_rate", "batch_size")
_TUNED = (*_TUNED_WITHOUT_TABLE, "table_learning_rate")
_FACTORS = (0.5, 2.0)


def isoflop(scale: Scale) -> Study:
    """Figure 1 and the first table of the paper: dense, expert-choice MoE, PKM and PEER at equal training FLOPs."""

    def tune(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            _run(scale, method, width=scale.middle_width, budget=scale.budgets[0], seed=0, tuning=label, **changes)
            for method in scale.layers
            for label, changes in _variants(scale, method, _FACTORS)
        ]

    def tune_further(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            _run(scale, method, width=scale.middle_width, budget=scale.budgets[0], seed=0, tuning=label, **changes)
            for method in scale.layers
            for label, changes in _further_variants(scale, method, losses)
        ]

    def measure(losses: Mapping[str, float]) -> list[GridRun]:
        best = {method: _best_settings(scale, method, losses) for method in scale.layers}
        return [
            _run(scale, method, width=width, budget=budget, seed=seed, **best[method])
            for budget in scale.budgets
            for seed in scale.seeds
            for width in scale.widths[budget]
            for method in scale.layers
        ]

    def extend(losses: Mapping[str, float]) -> list[GridRun]:
        if scale.last_budget is None:
            return []
        best = {method: _best_settings(scale, method, losses) for method in scale.layers}
        return [
            _run(scale, method, width=width, budget=scale.last_budget, seed=seed, **best[method])
            for seed in scale.seeds
            for method in scale.layers
            if (width := _best_width(scale, method, losses)) is not None
        ]

    question = "At equal training FLOPs, does PEER reach a lower loss than dense, expert-choice MoE and PKM?"
    return _study("isoflop", scale, question, tune, tune_further, measure, extend)


def num_experts(scale: Scale) -> Study:
    """The paper's ablation of N at 8 x 16 active experts: do more experts help?"""

    def stage(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            _peer(scale, budget, seed, {"num_experts": n}, num_experts=n)
            for budget in scale.budgets[:2]
            for seed in scale.seeds
            for n in scale.experts
        ]

    return _study("num-experts", scale, "Do more experts help, at equal active ones?", stage)


def active_experts(scale: Scale) -> Study:
    """The paper's ablation of h x k: do more active experts help?"""

    def stage(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            _peer(
                scale, budget, seed, {"num_heads": heads, "experts_per_head": k},
                heads=heads, experts_per_head=k, active=heads * k,
            )
            for budget in scale.budgets[:2]
            for seed in scale.seeds
            for heads, k in scale.active
        ]  # fmt: skip

    return _study("active-experts", scale, "Do more active experts help, out of as many?", stage)


def query_norm(scale: Scale) -> Study:
    """The paper's ablation of query batch normalisation, by the number of experts."""

    def stage(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            _peer(scale, budget, seed, {"num_experts": n, "query_norm": norm}, num_experts=n, query_norm=norm)
            for budget in scale.budgets[:1]
            for seed in scale.seeds
            for n in scale.experts
            for norm in ("batch", "none")
        ]

    return _study("query-norm", scale, "Does batch normalisation of the queries help, by the number of experts?", stage)


def usage(scale: Scale) -> Study:
    """The paper's table of perplexity, usage and unevenness by the number of experts, with and without query norm."""
    question = "How many experts are used and how evenly, by their number, with and without query norm?"
    return replace(query_norm(scale), name="usage", question=question)


def placement(scale: Scale) -> Study:
    """Which block should carry the experts? The paper takes the middle one."""

    def stage(losses: Mapping[str, float]) -> list[GridRun]:
        num_layers = scale.base.model.num_layers
        runs = []
        for seed in scale.seeds:
            for block in range(num_layers):
                run = _peer(scale, scale.budgets[0], seed, {}, block=block)
                model = replace(run.config.model, expert_blocks=(block,))
                runs.append(replace(run, config=replace(run.config, model=model)))
        return runs

    return _study("placement", scale, "Which block should carry the experts?", stage)


def optimiser(scale: Scale) -> Study:
    """Row-sparse or dense Adam on the tables, and at which learning rate? The paper does not say."""

    def stage(losses: Mapping[str, float]) -> list[GridRun]:
        rate = scale.peer_settings.get("table_learning_rate", scale.base.table_learning_rate)
        kinds: tuple[dict[str, Any], ...] = (
            {"table_gradients": "sparse"},
            {"table_gradients": "dense"},
            {"table_gradients": "sparse", "table_second_moment": "row"},
        )
        return [
            _peer(scale, scale.budgets[0], seed, {}, changes={**kind, "table_learning_rate": rate * factor},
                  optimiser="-".join(kind.values()), table_learning_rate=rate * factor)
            for seed in scale.seeds
            for kind in kinds
            for factor in (0.3, 1.0, 3.0)
        ]  # fmt: skip

    return _study("optimiser", scale, "Row-sparse or dense Adam on the tables, and at which learning rate?", stage)


def granularity(scale: Scale) -> Study:
    """Sizes, tokens and active experts all vary, for the law L(P, D, G) that the paper builds on."""

    def stage(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            _peer(
                scale, budget, seed, {"num_heads": heads, "experts_per_head": k},
                width=width, heads=heads, experts_per_head=k, active=heads * k,
            )
            for budget in scale.budgets[:2]
            for seed in scale.seeds
            for width in scale.widths[budget]
            for heads, k in scale.active
        ]  # fmt: skip

    return _study("granularity", scale, "How does the loss fall with size, tokens and granularity?", stage)


STUDIES: tuple[Callable[[Scale], Study], ...] = (
    isoflop,
    num_experts,
    active_experts,
    query_norm,
    usage,
    placement,
    optimiser,
    granularity,
)


def _study(name: str, scale: Scale, question: str, *stages: Any) -> Study:
    return Study(name=name, scale=scale.name, question=question, stages=stages)


def _variants(scale: Scale, method: str, factors: Sequence[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The default, and each setting changed by itself; dense and mixtures have no table."""
    yield "default", {}
    for setting in _TUNED if method in ("pkm", "peer") else _TUNED_WITHOUT_TABLE:
        for factor in factors:
            label, value = _changed(scale, setting, factor)
            if value != getattr(scale.base, setting):
                yield label, {setting: value}


def _changed(scale: Scale, setting: str, factor: float) -> tuple[str, float]:
    """A setting times a factor, and what to call it."""
    value = getattr(scale.base, setting) * factor
    name = setting.removesuffix("_learning_rate").removesuffix("_size")
    return f"{name}-x{factor:g}", max(1, round(value)) if setting == "batch_size" else value


def _further_variants(scale: Scale, method: str, losses: Mapping[str, float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The squares of the factors that are the best of their settings."""
    for setting, best in _best_settings(scale, method, losses).items():
        for factor in _FACTORS:
            label, value = _changed(scale, setting, factor**2)
            if _changed(scale, setting, factor)[1] == best and value != best:
                yield label, {setting: value}


def _best_settings(scale: Scale, method: str, losses: Mapping[str, float]) -> dict[str, Any]:
    """Of each setting the value of least loss, all taken together; a tuning run that is missing is no best."""

    def loss(label: str) -> float:
        run = _run(scale, method, width=scale.middle_width, budget=scale.budgets[0], seed=0, tuning=label)
        value = losses.get(run.name, math.inf)
        return value if math.isfinite(value) else math.inf

    default, best, chosen = loss("default"), {}, {}
    for label, changes in _variants(scale, method, (*_FACTORS, *(factor**2 for factor in _FACTORS))):
        for setting, value in changes.items():
            if loss(label) < best.get(setting, default):
                best[setting], chosen[setting] = loss(label), value
    return chosen


def _best_width(scale: Scale, method: str, losses: Mapping[str, float]) -> int | None:
    """Of least mean loss at the largest budget, among the widths whose seeds have all ended; None without one."""
    means = {}
    budget = scale.budgets[-1]
    for width in scale.widths[budget]:
        runs = [_run(scale, method, width=width, budget=budget, seed=seed) for seed in scale.seeds]
        mean = math.fsum(losses.get(run.name, math.inf) for run in runs) / len(runs)
        if math.isfinite(mean):
            means[width] = mean
    return min(means, key=lambda width: means[width], default=None)


def _run(
    scale: Scale, method: str, *, width: int, budget: float, seed: int, tuning: str | None = None, **changes: Any
) -> GridRun:
    config = scale.config(scale.layers[method], width=width, budget=budget, seed=seed, **changes)
    stem = f"tune-{method}-{tuning}" if tuning else f"{method}-d{width}-c{budget:.0e}".replace("+", "")
    axes: dict[str, Any] = {"stage": "tuning" if tuning else "main", "budget": budget, "width": width, "seed": seed}
    return GridRun(name=f"{stem}-seed{seed}", method=method, axes=axes, config=config)


def _peer(
    scale: Scale,
    budget: float,
    seed: int,
    layer_changes: Mapping[str, Any],
    *,
    width: int | None = None,
    changes: Mapping[str, Any] | None = None,
    **axes: Any,
) -> GridRun:
    """A PEER run of an ablation: the layer and the run with changes, named by the axes."""
    width = width or scale.middle_width
    layer = replace(scale.layers["peer"], **layer_changes)
    settings = {**scale.peer_settings, **(changes or {})}
    config: TrainConfig = scale.config(layer, width=width, budget=budget, seed=seed, **settings)
    written = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in axes.items()}
    words = "-".join(f"{name}-{value}" for name, value in written.items()).replace("_", "-")
    name = f"peer-d{width}-c{budget:.0e}-{words}-seed{seed}".replace("+", "")
    return GridRun(
        name=name, method="peer", axes={"budget": budget, "width": width, "seed": seed, **axes}, config=config
    )
