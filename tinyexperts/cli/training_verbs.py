"""The verbs of training and of its plans; each imports what it needs when it is called, and computes nothing.

(No `from __future__ import annotations`: tyro could not find the class of a verb's options by its name.)
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tinyexperts.errors import InputError

if TYPE_CHECKING:
    from tinyexperts.training import TrainConfig


def train_recipe(name: str) -> Callable[..., None]:
    """Return the command that trains a recipe, or resumes a run of it, whose settings are then its defaults."""
    from tinyexperts import training
    from tinyexperts.training.recipes import RECIPES

    default = _resumed(name, sys.argv[3:]) or RECIPES[name]()

    def train(
        config: Annotated[training.TrainConfig, tyro.conf.arg(name="")] = default,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        """Train a recipe, or resume a run of it.

        Args:
            resume: Continue from the last checkpoint of the run folder, with its settings: no need to give them again.
            progress: Show a progress bar.
        """
        training.train(config, resume=resume, progress=progress, command=sys.argv[1:])

    return train


def _resumed(name: str, options: Sequence[str]) -> "TrainConfig | None":
    """Return the configuration of the run that the options resume.

    Raises:
        InputError: the folder is not that of a run, or of a run of another recipe.
    """
    from tinyexperts.training import run_folder
    from tinyexperts.training.config import path_of
    from tinyexperts.training.recipes import RECIPES

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run", nargs="?", default=RECIPES[name]().run)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    typed, _ = parser.parse_known_args(options)
    if not typed.resume or typed.run is None:
        return None
    run = path_of("run", typed.run)
    config = run_folder.read_config(run)
    kind = config.model.expert_layer.kind
    own = [recipe_name for recipe_name, recipe in RECIPES.items() if recipe().model.expert_layer.kind == kind]
    if name not in own:
        raise InputError(f"{run} is a run of {own[0]}, which train {own[0]} --run {run} --resume continues, got {name}")
    return dataclasses.replace(config, run=run)  # it may have been moved


def teach() -> Callable[..., None]:
    """Teach a trained model new facts or texts, and show what it has learned and what it still knows."""
    from tinyexperts import training
    from tinyexperts.cli.tables import print_taught

    def teach(
        run: Annotated[Path, tyro.conf.Positional],
        config: Annotated[training.TeachConfig, tyro.conf.arg(name="")],
        progress: bool = True,
    ) -> None:
        """Teach a trained model new facts or texts, and show what it has learned and what it still knows.

        Args:
            run: Folder of the run whose model is taught; it stays as it is.
            progress: Show progress bars.
        """
        print_taught(training.teach_run(run, config, progress=progress, command=sys.argv[1:]))

    return teach


def plan_recipe(name: str) -> Callable[..., None]:
    """Return the command that plans a recipe."""
    from tinyexperts import planning, training
    from tinyexperts.cli.tables import print_plans
    from tinyexperts.planning import devices as devices_of_plan
    from tinyexperts.training.recipes import RECIPES

    def plan(
        devices: str,
        config: Annotated[training.TrainConfig, tyro.conf.arg(name="")] = RECIPES[name](),  # noqa: B008
        devices_per_node: int = 8,
        tflops: float = devices_of_plan.H100_TFLOPS,
        memory_gb_per_second: float = devices_of_plan.H100_MEMORY_GB_PER_SECOND,
        link_gb_per_second: float = devices_of_plan.H100_LINK_GB_PER_SECOND,
        node_link_gb_per_second: float = devices_of_plan.H100_NODE_LINK_GB_PER_SECOND,
    ) -> None:
        """Predict the memory, the communication and the time that a recipe takes on several devices.

        Args:
            devices: Number of devices and the memory of each: 8x80GB.
            devices_per_node: Devices of one node, between which exchanges are fast.
            tflops: Peak of a device in TFLOP/s, of which 40 % are counted on; default: an H100 SXM in bf16.
            memory_gb_per_second: GB/s between a device and its memory.
            link_gb_per_second: GB/s that a device sends to the others of its node.
            node_link_gb_per_second: GB/s that a device sends to those of other nodes; an exchange that spans nodes
                goes at this speed.
        """
        parsed = planning.Devices.parse(
            devices,
            per_node=devices_per_node,
            tflops=tflops,
            memory_gb_per_second=memory_gb_per_second,
            link_gb_per_second=link_gb_per_second,
            node_link_gb_per_second=node_link_gb_per_second,
        )
        print_plans(config, parsed, planning.plan(config, parsed))

    return plan
