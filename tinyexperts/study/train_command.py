"""The command of one run: a recipe, and every setting in which the run differs from it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from tinyexperts.training import recipes
from tinyexperts.training.config import TrainConfig

# The methods of the studies -> their recipes.
_RECIPES = {
    "dense": recipes.dense,
    "moe": recipes.expert_choice_moe,
    "pkm": recipes.product_key_memory,
    "peer": recipes.peer,
}


def train_command(method: str, config: TrainConfig) -> str:
    """What to type to run `config` by itself."""
    recipe = _RECIPES[method]
    name = recipe.__name__.replace("_", "-")
    return shlex.join(["tinyexperts", "train", name, *_options("--", config, recipe())])


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
