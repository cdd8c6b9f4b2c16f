"""The command of one run: a recipe, and every setting in which the run differs from it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from tinyexperts.comparison.methods import method_named
from tinyexperts.layers import PEERConfig, ProductKeyMemoryConfig
from tinyexperts.training import TrainConfig
from tinyexperts.training.config import TeachingConfig


def train_command(method: str, config: TrainConfig) -> str:
    """Return the command that trains one run of a method.

    Args:
        method (str): the name of the method.
        config (TrainConfig): the configuration of the run.
    """
    if config.teaching is not None:
        return _teach_command(config, config.teaching)
    row = method_named(method)
    return shlex.join(["tinyexperts", "train", row.recipe_name, *_options("--", config, row.recipe())])


def _teach_command(config: TrainConfig, teaching: TeachingConfig) -> str:
    remembered = {memory.teacher is None for memory in teaching.remember}
    remember = "nothing" if not remembered else "data" if remembered == {True} else "own-samples"
    options: dict[str, object] = {
        "data": config.data,
        "train": teaching.train,
        "rank": teaching.rank,
        "rows": teaching.rows,
        "remember": remember,
        "remember-weight": teaching.remember_weight if teaching.remember_weight != 1 else None,
        "table-learning-rate": config.optimizer.table_learning_rate if _has_taught_table(config) else None,
        "learning-rate": None if teaching.train == "tables" else config.optimizer.matrix_learning_rate,
        "passes": (config.num_steps or 0) // config.validation_every,
        "seed": config.seed,
        "threads": config.threads,
        "output": config.run,
    }
    if remember == "own-samples":
        options["sample-tokens"] = teaching.remember[-1].sample_tokens
    given = (part for name, value in options.items() if value is not None for part in (f"--{name}", str(value)))
    return shlex.join(["tinyexperts", "teach", str(teaching.base), *given])


def _has_taught_table(config: TrainConfig) -> bool:
    has_table = isinstance(config.model.expert_layer, PEERConfig | ProductKeyMemoryConfig)
    return has_table and config.teaching is not None and config.teaching.train != "low-rank"


def _options(prefix: str, config: Any, default: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        option = prefix + field.name.replace("_", "-")
        if value == usual:
            continue
        if dataclasses.is_dataclass(value):
            yield from _options(f"{option}.", value, usual)
        elif isinstance(value, bool):
            yield option if value else f"{prefix}no-{field.name.replace('_', '-')}"
        else:
            yield option
            yield from (str(part) for part in (value if isinstance(value, tuple) else (value,)))
