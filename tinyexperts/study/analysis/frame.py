"""A tidy frame of runs: one row each, with its place in the grid, its cost and what it reached.

`loss, held out` is the loss in nats a token on the held-out split, and `loss, <text>` that on another text; `new` and
`stood_earlier` are its parts by whether a token's bigram stood earlier in the context. Usage and unevenness (nats) are
means over layers. What a run lacks is NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyexperts.comparison.facts import NATS, RECALL
from tinyexperts.comparison.frame import HELD_OUT, row_of
from tinyexperts.comparison.results import Results, read_results
from tinyexperts.data import TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.planning.model_costs import account
from tinyexperts.study.grid import GOOD_EPOCHS, GridRun
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings

if TYPE_CHECKING:
    import pandas as pd

COSTS = (
    *("parameters_active", "parameters_total", "parameters_matmul", "num_tokens"),
    *("training_flops", "training_flops_without_router", "forward_bytes"),
)
FLOPS = ("attention", "dense_layers", "query_network", "sub_key_scores", "experts", "head")


@dataclass(frozen=True, kw_only=True)
class StudyRuns:
    """All planned runs of a study, as they were at one moment."""

    settings: StudySettings
    frame: pd.DataFrame
    """One row a run, in the order of their names; `state` is done, to come, or failed for good."""
    planned: Mapping[str, GridRun]
    """The runs as they were planned, by name."""
    results: Mapping[str, Results]
    """The folders of the runs that are done, by name."""
    problems: list[str]
    """A sentence for each thing that is missing or doubtful."""

    @property
    def done(self) -> pd.DataFrame:
        """The runs that are done."""
        return self.frame[self.frame.state == "done"]

    @property
    def to_come(self) -> pd.DataFrame:
        """The runs that are still to come."""
        return self.frame[self.frame.state == "to come"]


def texts_of(runs: pd.DataFrame) -> list[str]:
    """Return the columns of losses, the held-out split first."""
    return [column for column in runs.columns if column.startswith("loss, ")]


def read_runs(folder: StudyFolder) -> StudyRuns:
    """Read the runs of a study's folder, though runs may end meanwhile."""
    import pandas as pd

    settings, runs = folder.settings(), folder.planned_runs()
    statuses = {run.name: folder.status_of(run.name) for run in runs}
    problems: list[str] = []
    coming = [name for name, status in statuses.items() if status.state not in ("done", "failed")]
    if coming:
        problems.append(f"{len(coming)} of {len(runs)} runs are still to come: {_shortened(coming)}.")
    results, rows = {}, []
    for run in runs:
        status = statuses[run.name]
        row: dict[str, Any] = {"name": run.name, "method": run.method, **run.axes}
        row["state"] = "failed" if status.is_settled else "to come"
        if status.state == "failed":
            problems.append(f"{run.name} failed: {status.reason}.")
        if status.state == "done":
            path = folder.run_path(run.name)
            found = read_results(path)
            loss = found.evaluated("loss")
            if isinstance(loss, float) and math.isfinite(loss):
                results[run.name] = found
                row |= {"state": "done", **row_of(found), **_costs(run)}
                for name in settings.corpora():
                    evaluation = json.loads((path / f"evaluation-{name}.json").read_text(encoding="utf-8"))
                    row[f"loss, {name}"] = evaluation["loss"]
            else:
                problems.append(f"{run.name} ended with a loss of {loss} and is left out.")
        rows.append(row)
    frame = pd.DataFrame(rows).set_index("name", drop=False) if results else pd.DataFrame(columns=["state"])
    return StudyRuns(
        settings=settings,
        frame=frame,
        planned={run.name: run for run in runs},
        results=results,
        problems=problems + (_repeated(settings, frame[frame.state == "done"]) if results else []),
    )


def _costs(run: GridRun) -> dict[str, Any]:
    cost = account(run.config)
    flops = {f"{part}_flops": getattr(cost.forward_flops, part) for part in (*FLOPS, "total")}
    return {**{name: getattr(cost, name) for name in COSTS}, **flops}


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} others"


def _repeated(settings: StudySettings, done: pd.DataFrame) -> list[str]:
    """Return a sentence about runs that saw their data more often than is as good as new; facts are meant to be."""
    if done[NATS].notna().any():
        return []
    try:
        num_tokens = TokenDataset.open(Path(settings.data), verify=False).split("train").num_tokens
    except InputError as error:
        return [f"How often data was repeated is not known: {error}."]
    epochs = done.num_tokens / num_tokens
    num_repeated = int((epochs > GOOD_EPOCHS).sum())
    if not num_repeated:
        return []
    return [
        f"{num_repeated} runs saw their training data more than {GOOD_EPOCHS} times, {epochs.idxmax()} most often "
        f"({epochs.max():.1f} times): their losses are too high, those of small models most."
    ]


def points_of(runs: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """Return one row for each point of a grid: its cost, and the mean of its runs over their seeds."""
    groups = runs.groupby(list(axes), sort=False)
    points = groups[["name", *COSTS, *(f"{part}_flops" for part in (*FLOPS, "total"))]].first()
    points["loss"] = groups[HELD_OUT].mean()
    points["deviation"] = groups[HELD_OUT].std()
    points[["usage", "unevenness"]] = groups[["usage", "unevenness"]].mean()
    points[["nats", "recall"]] = groups[[NATS, RECALL]].mean()
    points["num_seeds"] = groups.size()
    return points.reset_index()


def losses_at(costs: Sequence[float], losses: Sequence[pd.Series], value: float) -> pd.Series | None:
    """Return the losses by seed at a cost between those of several budgets; None beyond them.

    Between two budgets the loss is taken as linear in the logarithm of the cost.

    Args:
        costs (Sequence[float]): the ascending costs of the budgets.
        losses (Sequence[pd.Series]): the losses by seed at each budget.
        value (float): the cost.
    """
    for (low, before), (high, after) in pairwise(zip(costs, losses, strict=True)):
        if low <= value <= high and low < high:  # False for a cost that is not a number
            share = math.log(value / low) / math.log(high / low)
            return ((1 - share) * before + share * after).dropna()
    return None
