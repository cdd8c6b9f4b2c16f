"""The grid of the lifelong study: base models, a round to tune learning rates on, and rounds one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tinyexperts.comparison.methods import method_named
from tinyexperts.data import TokenDataset
from tinyexperts.layers import PEERConfig
from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.scales import Scale
from tinyexperts.training.config import MemoryConfig, Remember, TeachingConfig, Train, TrainConfig
from tinyexperts.training.teaching import teaching_run

# Learning rates that are tried, ascending; beyond an end that wins, one more. Where everything is trained, that of the
# tables is three times as large.
LEARNING_RATES: Mapping[Train, tuple[float, ...]] = {
    "tables": (3e-3, 1e-2, 3e-2),
    "low-rank": (3e-3, 1e-2, 3e-2),
    "everything": (3e-4, 1e-3, 3e-3),
}
_TABLE_FACTOR = 3
_RATES_OF_ROWS = (1e-2, 3e-2, 1e-1)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to teach: a model, what of it is trained, and what is remembered by."""

    method: str
    train: Train
    remember: Remember
    num_experts: int | None = None
    """Experts of PEER; None: as many as the scale has."""
    chooses_rows: bool = False
    """A step trains the rows of highest TF-IDF alone, with larger learning rates."""

    @property
    def model(self) -> str:
        """The name of the base model, without its seed."""
        return self.method if self.num_experts is None else f"{self.method}-n{self.num_experts}"

    @property
    def name(self) -> str:
        """The name of the way in those of its runs."""
        return f"{self.model}-{'rows' if self.chooses_rows else self.train}-{self.remember}"

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Those that are tried."""
        return _RATES_OF_ROWS if self.chooses_rows else LEARNING_RATES[self.train]


def ways(scale: Scale) -> list[Way]:
    """Return the ways that are compared: each with each, and PEER's tables with fewer and with more experts."""
    every = [
        Way(method=method, train=train, remember=remember)
        for method in scale.layers
        for train in LEARNING_RATES
        if train != "tables" or method_named(method).has_table
        for remember in scale.teaching.remember
    ]
    other_numbers = [
        Way(method="peer", train="tables", remember=remember, num_experts=number)
        for number in scale.teaching.experts
        for remember in scale.teaching.remember
        if remember != "nothing"
    ]
    # As in the paper of this choice, where nothing is remembered but which rows old texts use.
    rows = Way(method="peer", train="tables", remember="nothing", chooses_rows=True)
    return [*every, *other_numbers, rows]


def stages(scale: Scale) -> tuple[Stage, ...]:
    """Return the stages: base models, tuning, the learning rates beyond an end that won, and the rounds."""
    base = partial(_base_runs, scale)
    if not scale.rounds:
        return (base,)
    rounds = [partial(_round, scale, number) for number in range(1, len(scale.rounds))]
    return base, partial(_tuning, scale), partial(_further_tuning, scale), *rounds


def base_name(way: Way, seed: int) -> str:
    """Return the name of a way's base run."""
    return f"base-{way.model}-seed{seed}"


def round_name(way: Way, number: int, seed: int) -> str:
    """Return the name of the run of a round, from 1; round 0 is the base."""
    return f"{way.name}-round{number}-seed{seed}" if number else base_name(way, seed)


def round_facts(number: int) -> str:
    """Return the name of a round's facts in metrics."""
    return f"round-{number}"


def _base_runs(scale: Scale, losses: Mapping[str, float]) -> list[GridRun]:
    models = {way.model: way for way in ways(scale)}.values()
    runs = []
    for seed in scale.seeds:
        for way in models:
            config = _base_config(scale, way, seed)
            axes: dict[str, Any] = {"stage": "base", "model": way.model, "seed": seed}
            axes |= {"budget": scale.tuning_budget, "width": config.model.d_model}
            runs.append(
                GridRun(name=base_name(way, seed), method=way.method, axes=axes, config=config, keeps_checkpoint=True)
            )
    return runs


def _base_config(scale: Scale, way: Way, seed: int) -> TrainConfig:
    layer = scale.layers[way.method]
    if way.num_experts is not None and isinstance(layer, PEERConfig):
        layer = replace(layer, num_experts=way.num_experts)
    return scale.config(
        layer,
        width=scale.method_widths.get(way.method, scale.middle_width),
        budget=scale.tuning_budget,
        seed=seed,
        validation_every=1000,
        validation_tokens=2**17,  # all that is held out
    )


def _tuning(scale: Scale, losses: Mapping[str, float]) -> list[GridRun]:
    return [_tuning_run(scale, way, rate) for way in _tuned(scale, losses) for rate in way.learning_rates]


def _further_tuning(scale: Scale, losses: Mapping[str, float]) -> list[GridRun]:
    runs = []
    for way in _tuned(scale, losses):
        rates, best = way.learning_rates, best_learning_rate(way, losses)
        if best in (rates[0], rates[-1]):
            runs.append(_tuning_run(scale, way, _beyond(rates, best)))
    return runs


def _tuned(scale: Scale, losses: Mapping[str, float]) -> Iterator[Way]:
    """Yield the ways that have a learning rate of their own and a base; other numbers of experts take PEER's."""
    for way in ways(scale):
        if way.num_experts is None and base_name(way, scale.seeds[0]) in losses:
            yield way


def _beyond(rates: Sequence[float], end: float) -> float:
    """Return the next learning rate beyond an end, as far as the last two lie apart."""
    return end * (rates[0] / rates[1] if end == rates[0] else rates[-1] / rates[-2])


def best_learning_rate(way: Way, losses: Mapping[str, float]) -> float | None:
    """Return the learning rate after which the tuning round's facts and the base's cost least; None without a run."""
    tuned, rates = replace(way, num_experts=None), way.learning_rates
    tried = (_beyond(rates, rates[0]), *rates, _beyond(rates, rates[-1]))
    found = {rate: losses.get(_tuning_name(tuned, rate), math.inf) for rate in tried}
    best = min(found, key=lambda rate: found[rate])
    return best if math.isfinite(found[best]) else None


def _tuning_name(way: Way, rate: float) -> str:
    return f"tune-{way.name}-lr{rate:.2g}"


def _tuning_run(scale: Scale, way: Way, rate: float) -> GridRun:
    seed = scale.seeds[0]
    run = _taught(scale, way, name=_tuning_name(way, rate), number=0, seed=seed, rate=rate)
    return replace(run, axes={**run.axes, "stage": "tuning"})


def _round(scale: Scale, number: int, losses: Mapping[str, float]) -> list[GridRun]:
    return [
        replace(
            _taught(scale, way, name=round_name(way, number, seed), number=number, seed=seed, rate=rate),
            keeps_checkpoint=number + 1 < len(scale.rounds),
        )
        for seed in scale.seeds
        for way in ways(scale)
        if (rate := best_learning_rate(way, losses)) is not None and round_name(way, number - 1, seed) in losses
    ]


def _taught(scale: Scale, way: Way, *, name: str, number: int, seed: int, rate: float) -> GridRun:
    """Return the run that teaches a round to the model of the round before; round 0, for tuning, to the base."""
    before = [scale.runs / round_name(way, earlier, seed) for earlier in range(max(1, number))]
    axes: dict[str, Any] = {"stage": "round", "model": way.model, "train": way.train, "remember": way.remember}
    axes["chooses_rows"] = way.chooses_rows
    base_config = _base_config(scale, way, seed)
    teaching = TeachingConfig(
        base=before[-1],
        train=way.train,
        rows=scale.teaching.rows if way.chooses_rows else None,
        old_texts=(base_config.data,) if way.chooses_rows else (),
        remember=_memories(scale, way, before, scale.runs / name, base_config.data),
        asked={"base": base_config.data}
        | {round_facts(earlier): path for earlier, path in enumerate(scale.rounds[1:number], start=1)},
    )
    config = teaching_run(
        base_config,
        teaching,
        TokenDataset.open(scale.rounds[number], verify=False),
        run=Path(),
        passes=scale.teaching.passes,
        table_learning_rate=rate if way.train == "tables" else _TABLE_FACTOR * rate,
        learning_rate=rate,
    )
    return GridRun(
        name=name,
        method=way.method,
        axes={**axes, "round": number, "rounds": len(scale.rounds) - 1, "seed": seed, "learning_rate": rate},
        config=replace(config, checkpoint=replace(config.checkpoint, keep=1)),
    )


def _memories(scale: Scale, way: Way, before: Sequence[Path], run: Path, base_data: Path) -> tuple[MemoryConfig, ...]:
    """Return what is remembered by, as `tinyexperts teach` remembers: all data so far, or each model's own samples.

    Args:
        scale (Scale): the scale.
        way (Way): the way to teach.
        before (Sequence[Path]): the runs of the base and of the rounds before.
        run (Path): the run that teaches.
        base_data (Path): the data set of the base.
    """
    if way.remember == "nothing":
        return ()
    if way.remember == "data":
        return tuple(MemoryConfig(data=data) for data in (*reversed(scale.rounds[1 : len(before)]), base_data))
    kept = tuple(
        MemoryConfig(data=taught / "teaching" / "own-samples", teacher=teacher)
        for taught, teacher in zip(before[1:], before[:-1], strict=True)
    )
    tokens = scale.teaching.sample_tokens // (4 if kept else 1)
    own = MemoryConfig(data=run / "teaching" / "own-samples", teacher=before[-1], sample_tokens=tokens)
    return *kept, own
