"""A study as a grid of ordinary training runs, some of which depend on how earlier ones ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tinyexperts.errors import InputError
from tinyexperts.planning.accounting import account
from tinyexperts.training.config import TrainConfig

# Data repeated more often than this is hardly better than none (arXiv 2305.16264 finds little left after 16 epochs).
MAX_EPOCHS = 16
# Up to so many epochs repeated data is as good as new there; beyond, the report flags a run.
GOOD_EPOCHS = 4


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """A run of a study.

    name: of its folder
    method: dense, moe, pkm or peer
    axes: where it stands in the grid: what the report groups by
    config: the run, but for its folder
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    method: str
    axes: dict[str, float | int | str | bool]
    config: TrainConfig


# Losses (nats) of the finished runs by name -> the runs of a stage.
Stage = Callable[[Mapping[str, float]], list[GridRun]]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and the stages of runs that answer it: a stage is planned when the one before has ended."""

    name: str
    scale: str
    question: str
    stages: tuple[Stage, ...]


def expected_runs(study: Study) -> list[GridRun]:
    """All runs of a study as if every run ended with the same loss: what it may cost, before anything is known."""
    losses: dict[str, float] = {}
    planned: list[GridRun] = []
    for stage in study.stages:
        runs = stage(losses)
        planned += runs
        losses |= dict.fromkeys((run.name for run in runs), 0.0)
    return planned


def check_grid(runs: Sequence[GridRun], num_train_tokens: int) -> None:
    """Refuse a grid that can't be run as it is meant.

    Raises:
        InputError: a budget that affords no step, or a corpus too small for a budget.
    """
    for run in runs:
        cost = account(run.config)
        if cost.num_steps < 1:
            raise InputError(
                f"the budget of {run.name}, {run.config.training_flops:.3g} FLOPs, affords no step: one costs "
                f"{cost.training_flops_per_step:.3g}"
            )
        if cost.num_tokens > MAX_EPOCHS * num_train_tokens:
            raise InputError(
                f"{run.name} trains on {cost.num_tokens:,} tokens, and {run.config.data} holds {num_train_tokens:,}: "
                f"they would be repeated {cost.num_tokens / num_train_tokens:.0f} times (at most {MAX_EPOCHS})"
            )
