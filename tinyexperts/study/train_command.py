"""The command of one run: a recipe, and every setting in which the run differs from it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from tinyexperts.comparison.methods import method_named
from tinyexperts.training import TrainConfig


def train_command(method: str, config: TrainConfig) -> str:
    """Return the command that trains one run of a method.

    Args:
        method (str): the name of the method.
        config (TrainConfig): the configuration of the run.
    """
    row = method_named(method)
    return shlex.join(["tinyexperts", "train", row.recipe_name, *_options("--", config, row.recipe())])


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
