"""Which verbs there are, and how what is typed reaches them; bad input is one sentence."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Union

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from tinyexperts import training
from tinyexperts.cli import verbs
from tinyexperts.errors import InputError
from tinyexperts.study.grids import studies
from tinyexperts.training import recipes


def _group(description: str, commands: dict[str, Callable[..., None]]) -> Callable[..., None]:
    """A verb with verbs of its own."""
    choices: list[Any] = [
        Annotated[Any, tyro.conf.subcommand(name=name, constructor=verb)] for name, verb in commands.items()
    ]
    choices.append(Annotated[None, tyro.conf.Suppress])  # a union of one would be no choice, and ask for no verb

    def group(command: Any) -> None:
        """The chosen verb has run when this is called."""

    group.__annotations__["command"] = Annotated[Union[tuple(choices)], tyro.conf.arg(name="")]  # noqa: UP007
    group.__doc__ = description
    return group


RECIPES = (recipes.peer, recipes.dense, recipes.expert_choice_moe, recipes.product_key_memory)

VERBS = {
    "data": _group(
        "Fetch texts, prepare data sets of tokens, and verify them.",
        {"fetch": verbs.fetch, "prepare": verbs.prepare, "verify": verbs.verify},
    ),
    "train": _group(
        "Train a language model by a recipe; --help after the recipe's name lists every setting.",
        {recipe.__name__.replace("_", "-"): verbs.train_recipe(recipe) for recipe in RECIPES},
    ),
    "plan": _group(
        "Say what a recipe would take on several devices: memory, exchanges and time, for each mesh of them.",
        {recipe.__name__.replace("_", "-"): verbs.plan_recipe(recipe) for recipe in RECIPES},
    ),
    "evaluate": verbs.evaluate,
    "generate": verbs.generate,
    "study": _group(
        "Train and compare several models, and write reports.",
        {
            "demo": verbs.demo,
            "report": verbs.report,
            **{make.__name__.replace("_", "-"): verbs.study_command(make) for make in studies.STUDIES},
            "status": verbs.study_status,
            "run": verbs.run_of_study,
        },
    ),
    "bench": _group("Measure the layers on this machine.", {"layer": verbs.bench_layer}),
}


class _RefusedConfig(Exception):
    """An InputError of a configuration on its way through the parser, which would draw a box around a ValueError."""


def _plain_refusals() -> ConstructorRegistry:
    """Builds dataclasses as tyro does, but what they refuse stays one sentence."""
    registry = ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def as_tyro_does(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True  # the next answer is to be that of tyro's own rules
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, StructConstructorSpec):
            return spec

        @functools.wraps(spec.instantiate)
        def instantiate(**fields: Any) -> Any:
            try:
                return spec.instantiate(**fields)
            except InputError as error:
                raise _RefusedConfig(str(error)) from error

        return dataclasses.replace(spec, instantiate=instantiate)

    return registry


def main() -> None:
    """Run a verb; bad input is one sentence and exit code 2, an interruption 130."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="tinyexperts",
            description="Train, measure and use language models with PEER layers.",
            config=(tyro.conf.AvoidSubcommands,),
            registry=_plain_refusals(),
        )
    except (InputError, _RefusedConfig, OSError) as error:  # OSError: an unwritable folder, a full disk
        _exit(error, 2)
    except training.LostRank as error:
        _exit(error, 1)
    except (training.Interrupted, KeyboardInterrupt) as stop:
        _exit(str(stop) or "interrupted", 130)


def _exit(why: object, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"tinyexperts{'' if rank == '0' else f' (rank {rank})'}: {why}", file=sys.stderr)
    sys.exit(code)
