"""The grid of a study: ordinary training runs, planned stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tinyexperts.errors import InputError
from tinyexperts.planning.model_costs import account
from tinyexperts.training import TrainConfig

# Data repeated more often than this is hardly better than none (arXiv 2305.16264 finds little left after 16 epochs).
MAX_EPOCHS = 16
# Up to this many epochs repeated data is as good as new there; the report flags a run with more.
GOOD_EPOCHS = 4


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """A run of a study."""

    name: str
    """The name of its folder."""
    method: str
    """The name of its method (methods.py)."""
    axes: dict[str, float | int | str | bool]
    """Its place in the grid, by which the report groups runs."""
    config: TrainConfig
    """Its configuration, of which the study's folder replaces the run's folder."""
    is_alone: bool = False
    """It is run with no other beside it, so that its speed can be compared."""
    keeps_checkpoint: bool = False
    """Its weights stay when it is evaluated, for runs that begin with them."""


# Losses (nats) of the finished runs by name -> the runs of a stage, which is planned when the one before has ended.
Stage = Callable[[Mapping[str, float]], list[GridRun]]


def expected_runs(stages: Sequence[Stage]) -> list[GridRun]:
    """Return the runs of all stages as if every run ended with the same loss, to estimate their cost."""
    losses: dict[str, float] = {}
    planned: list[GridRun] = []
    for stage in stages:
        runs = stage(losses)
        planned += runs
        losses |= dict.fromkeys((run.name for run in runs), 0.0)
    return planned


def check_grid(runs: Sequence[GridRun], num_train_tokens: float) -> None:
    """Refuse a grid that can't be run as it is meant.

    Args:
        runs (Sequence[GridRun]): the runs of the grid.
        num_train_tokens (float): tokens of the training split; inf: however often it is repeated.

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
