"""Which verbs there are, and how what is typed reaches them; bad input is one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, TextIO, Union

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from tinyexperts import training
from tinyexperts.cli import verbs
from tinyexperts.errors import InputError
from tinyexperts.study import studies
from tinyexperts.training import recipes, run_folder
from tinyexperts.training.config import path_of


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
_RECIPE_BY_NAME = {recipe.__name__.replace("_", "-"): recipe for recipe in RECIPES}


def _train(resumed: Mapping[str, training.TrainConfig]) -> Callable[..., None]:
    """The verb; `resumed` holds the configuration of the run to go on with, by the name of its recipe."""
    return _group(
        "Train a language model by a recipe; --help after the recipe's name lists every setting.",
        {name: verbs.train_recipe(recipe, resumed.get(name)) for name, recipe in _RECIPE_BY_NAME.items()},
    )


VERBS = {
    "data": _group(
        "Fetch texts, prepare data sets of tokens, and verify them.",
        {"fetch": verbs.fetch, "prepare": verbs.prepare, "verify": verbs.verify},
    ),
    "train": _train({}),
    "plan": _group(
        "Say what a recipe would take on several devices: memory, exchanges and time, for each mesh of them.",
        {name: verbs.plan_recipe(recipe) for name, recipe in _RECIPE_BY_NAME.items()},
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


def _resumed(arguments: Sequence[str]) -> dict[str, training.TrainConfig]:
    """The configuration of the run that is to go on, by the name of its recipe: the defaults of what is not typed.

    Raises:
        InputError: the folder is not that of a run, or of a run of another recipe.
    """
    if len(arguments) < 2 or arguments[0] != "train" or arguments[1] not in _RECIPE_BY_NAME:
        return {}
    name, usual = arguments[1], _RECIPE_BY_NAME[arguments[1]]()
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--run", nargs="?", default=usual.run)
    options.add_argument("--resume", action=argparse.BooleanOptionalAction)
    typed, _ = options.parse_known_args(arguments[2:])
    if not typed.resume or typed.run is None:
        return {}
    run = path_of("run", typed.run)
    config = run_folder.read_config(run)
    kinds = {type(recipe().model.expert_layer): recipe_name for recipe_name, recipe in _RECIPE_BY_NAME.items()}
    own = kinds[type(config.model.expert_layer)]
    if own != name:
        raise InputError(f"{run} is a run of {own}, which train {own} --run {run} --resume goes on with, got {name}")
    return {name: dataclasses.replace(config, run=run)}  # it may have been moved


def main() -> None:
    """Run a verb; bad input is one sentence and exit code 2, an interruption 130, a reader that has gone 141."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal can't show must not end a verb.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            tyro.extras.subcommand_cli_from_dict(
                {**VERBS, "train": _train(_resumed(sys.argv[1:]))},
                prog="tinyexperts",
                description="Train, measure and use language models with PEER layers.",
                config=(tyro.conf.AvoidSubcommands,),
                registry=_plain_refusals(),
            )
        finally:
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()  # here it can be told of
    except (InputError, _RefusedConfig, OSError) as error:  # OSError: an unwritable folder, a full disk
        if isinstance(error, BrokenPipeError) and _reader_has_gone(sys.stdout):
            _leave(141)  # as what SIGPIPE ends: `tinyexperts ... | head` has seen enough
        _exit(error, 2)
    except training.LostRank as error:
        _exit(error, 1)
    except (training.Interrupted, KeyboardInterrupt) as stop:
        _exit(str(stop) or "interrupted", 130)


def _reader_has_gone(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except (OSError, ValueError):  # no file of the operating system's
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _exit(why: object, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    with suppress(OSError):
        print(f"tinyexperts{'' if rank == '0' else f' (rank {rank})'}: {why}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> None:
    """Exit, without what a stream would not take: Python would try again, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
