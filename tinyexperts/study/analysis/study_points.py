"""The finished runs of a study as points: where each stands in the grid, what it cost and what it reached."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tinyexperts.data import TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.planning.accounting import Account, account
from tinyexperts.report.numbers import MISSING
from tinyexperts.study.analysis.run_results import RunResult, read_run
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.study import GOOD_EPOCHS, GridRun

HELD_OUT = "held out"


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One run.

    losses: nats a token by text: the held-out split, then the evaluation corpora
    """

    run: GridRun
    result: RunResult
    cost: Account
    losses: dict[str, float]

    @property
    def seed(self) -> int:
        return self.run.config.seed

    @property
    def loss(self) -> float:
        """On the held-out split."""
        return self.losses[HELD_OUT]

    @property
    def seconds(self) -> float:
        """Of training; 0 where the metrics don't tell."""
        return float(self.result.last.get("seconds", 0.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The seeds of one point of the grid."""

    points: tuple[Point, ...]

    @property
    def first(self) -> Point:
        return self.points[0]

    def losses(self, text: str = HELD_OUT) -> dict[int, float]:
        """By seed."""
        return {point.seed: point.losses[text] for point in self.points if text in point.losses}

    def mean_loss(self, text: str = HELD_OUT) -> float:
        losses = self.losses(text)
        return math.fsum(losses.values()) / len(losses) if losses else math.nan

    def standard_deviation(self) -> float | None:
        """Of the held-out loss over seeds; None for one."""
        losses = list(self.losses().values())
        return statistics.stdev(losses) if len(losses) > 1 else None

    def unevenness(self) -> dict[int, float]:
        """Of the experts' use in nats, mean over layers, by seed."""
        layers = {point.seed: [layer.unevenness for layer in point.result.expert_usage] for point in self.points}
        return {seed: statistics.fmean(values) for seed, values in layers.items() if values}

    def usage_told(self) -> tuple[str, str]:
        """Share of the experts that are used in percent, and unevenness in nats, over seeds and layers."""
        layers = [layer for point in self.points for layer in point.result.expert_usage]
        if not layers:
            return MISSING, MISSING
        usage = statistics.fmean(layer.usage for layer in layers)
        return f"{100 * usage:.1f}", f"{statistics.fmean(layer.unevenness for layer in layers):.2f}"


@dataclass(frozen=True, kw_only=True)
class StudyPoints:
    """What a study has come to: the points of its runs that are done, the runs that are still to come, and a sentence
    for whatever is missing or doubtful."""

    done: list[Point]
    to_come: list[GridRun]
    problems: list[str]


def read_points(folder: StudyFolder) -> StudyPoints:
    """All of it as of one moment, though runs may end meanwhile."""
    points, problems = [], []
    runs = folder.planned_runs()
    statuses = {run.name: folder.status(run) for run in runs}
    to_come = [name for name, status in statuses.items() if status.state not in ("done", "failed")]
    if to_come:
        problems.append(f"{len(to_come)} of {len(runs)} runs are still to come: {_shortened(to_come)}.")
    for run in runs:
        status = statuses[run.name]
        if status.state == "failed":
            problems.append(f"{run.name} failed: {status.reason}.")
        if status.state != "done":
            continue
        path = folder.run_path(run.name)
        result = read_run(path)
        loss = result.evaluated("loss")
        if not isinstance(loss, float) or not math.isfinite(loss):
            problems.append(f"{run.name} ended with a loss of {loss} and is left out.")
            continue
        losses = {HELD_OUT: loss}
        for name in folder.settings().corpora():
            losses[name] = json.loads((path / f"evaluation-{name}.json").read_text(encoding="utf-8"))["loss"]
        points.append(Point(run=run, result=result, cost=account(run.config), losses=losses))
    return StudyPoints(
        done=points,
        to_come=[run for run in runs if not statuses[run.name].is_settled],
        problems=problems + _repeated(folder, points),
    )


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} others"


def _repeated(folder: StudyFolder, points: Sequence[Point]) -> list[str]:
    """Runs that saw their data more often than is as good as new."""
    try:
        num_tokens = TokenDataset.open(Path(folder.settings().data), verify=False).split("train").num_tokens
    except InputError as error:
        return [f"How often data was repeated is not known: {error}."]
    epochs = {point.run.name: point.cost.num_tokens / num_tokens for point in points}
    repeated = {name: value for name, value in epochs.items() if value > GOOD_EPOCHS}
    if not repeated:
        return []
    worst = max(repeated, key=lambda name: repeated[name])
    return [
        f"{len(repeated)} runs saw their training data more than {GOOD_EPOCHS} times, {worst} most often "
        f"({repeated[worst]:.1f} times): their losses are too high, those of small models most."
    ]


def groups_of(points: Iterable[Point]) -> list[Group]:
    """Points that differ in their seed alone, in the order of the grid."""
    found: dict[tuple[object, ...], list[Point]] = {}
    for point in points:
        axes = {name: value for name, value in point.run.axes.items() if name != "seed"}
        found.setdefault((point.run.method, *sorted(axes.items(), key=str)), []).append(point)
    return [Group(points=tuple(sorted(members, key=lambda point: point.seed))) for members in found.values()]


def losses_at(cost: Callable[[Group], float], value: float, groups: Sequence[Group]) -> dict[int, float] | None:
    """What groups of ascending budgets reach at a cost of another kind, by seed; None beyond what they cost.

    Between two budgets the loss is taken as linear in the logarithm of the cost.
    """
    for less, more in pairwise(groups):
        low, high = cost(less), cost(more)
        if low <= value <= high and low < high:  # never of a cost that is not a number
            share = math.log(value / low) / math.log(high / low)
            before, after = less.losses(), more.losses()
            return {seed: (1 - share) * before[seed] + share * after[seed] for seed in before if seed in after}
    return None


def flops_without_router(group: Group) -> float:
    """Training FLOPs of a run of the group, its router left out."""
    return group.first.cost.training_flops_without_router
