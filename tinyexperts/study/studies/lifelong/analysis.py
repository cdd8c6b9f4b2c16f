"""What models knew before and after each round of new facts: recall by round, what is kept at equal learning, costs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from tinyexperts.comparison.methods import METHODS
from tinyexperts.comparison.results import Results
from tinyexperts.layers import PEERConfig
from tinyexperts.statistics.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.frame import StudyRuns
from tinyexperts.study.studies.lifelong.grid import Way, base_name, round_facts, round_name
from tinyexperts.training.config import Remember, Train

BASE = "base"


class LifelongAnalysis:
    """The runs of a lifelong study, by the way in which they were taught."""

    def __init__(self, runs: StudyRuns) -> None:
        self.runs = runs
        planned = [run for run in runs.planned.values() if run.axes["stage"] == "round"]
        self.ways = sorted({way_of(run.axes, run.method) for run in planned}, key=_order)
        self.num_rounds = max((int(run.axes["rounds"]) for run in planned), default=0)
        self._planned_up_to = max((int(run.axes["round"]) for run in planned), default=0)
        self.seeds = sorted({int(run.axes["seed"]) for run in planned})
        self.num_experts = {
            way_of(run.axes, run.method): layer.num_experts
            for run in planned
            if isinstance(layer := run.config.model.expert_layer, PEERConfig) and not run.axes["chooses_rows"]
        }
        """The experts of the ways that teach PEER, all rows that a step retrieves."""
        self.learning_rates = {way_of(run.axes, run.method): float(run.axes["learning_rate"]) for run in planned}

    def result(self, way: Way, number: int, seed: int) -> Results | None:
        """Return the folder of a round's run, 0 for the base's; None where it is not done."""
        return self.runs.results.get(round_name(way, number, seed))

    def is_finished(self, *ways: Way, number: int) -> bool:
        """Return True if no run of some ways is still to come up to a round; one that failed for good is not."""
        names = [round_name(way, each, seed) for way in ways for seed in self.seeds for each in range(1, number + 1)]
        return number <= self._planned_up_to and not set(names) & set(self.runs.to_come.name)

    def recalls(self, way: Way, number: int, seed: int) -> dict[str, float]:
        """Return the recall after a round of the base's facts and of each round's that was taught by then, by name.

        Rounds are called by their numbers. It is empty where the run is not done.
        """
        found = self.result(way, number, seed)
        if found is None:
            return {}
        if not number:
            recall = found.evaluated("facts", "validation", "all", "recall")
            return {} if recall is None else {BASE: float(recall)}
        return _recalls(found.validation[-1], number) if found.validation else {}

    def mean_recalls(self, way: Way, number: int) -> dict[str, float]:
        """Return the means over seeds of the recalls after a round."""
        by_seed = [found for seed in self.seeds if (found := self.recalls(way, number, seed))]
        return {name: statistics.fmean(found[name] for found in by_seed) for name in (by_seed[0] if by_seed else {})}

    def forgotten(self, way: Way) -> dict[int, float]:
        """Return the share of the base's recall, in %, that is lost after the last round, by seed."""
        shares = {}
        for seed in self.seeds:
            before, after = (self.recalls(way, number, seed).get(BASE) for number in (0, self.num_rounds))
            if before and after is not None:
                shares[seed] = 100 * (1 - after / before)
        return shares

    def forgotten_at_equal_learning(self, way: Way, other: Way) -> SeedInterval | None:
        """Return the difference of what two ways forget of the base in the first round, once they learned as much.

        As much is what the one that learns less learns at most; a seed with which one of them learns nothing is left
        out. Between two passes the curve is taken as straight.
        """
        shares: list[dict[int, float]] = [{}, {}]
        for seed in self.seeds:
            mine, theirs = (self.curve(each, seed) for each in (way, other))
            if mine is None or theirs is None:
                continue
            learned = min(float(mine[:, 0].max()), float(theirs[:, 0].max()))
            if learned > max(mine[0, 0], theirs[0, 0]):
                for share, curve in zip(shares, (mine, theirs), strict=True):
                    share[seed] = 100 - _at(curve, learned)
        return paired_difference(*shares)

    def curve(self, way: Way, seed: int) -> np.ndarray | None:
        """Return the passes of the first round as rows (recall of the new facts, share of the base's kept), both in %.

        The first row is the model before it is taught. None where the run is not done, or the base knew nothing.
        """
        found = self.result(way, 1, seed)
        if found is None or not found.validation or not found.validation[0][f"{BASE}_recall"]:
            return None
        base = found.validation[0][f"{BASE}_recall"]
        return np.array([(100 * line["recall"], 100 * line[f"{BASE}_recall"] / base) for line in found.validation])

    def cost(self, way: Way) -> Mapping[str, float]:
        """Return the means of a round's seconds and training FLOPs, and of those of its base, over the seeds.

        The seconds and FLOPs of drawing own samples are counted.
        """
        of_rounds = [
            _cost(found)
            for number in range(1, self.num_rounds + 1)
            for seed in self.seeds
            if (found := self.result(way, number, seed)) is not None
        ]
        of_bases = [
            _cost(found) for seed in self.seeds if (found := self.runs.results.get(base_name(way, seed))) is not None
        ]
        means: dict[str, float] = {}
        for name, costs in (("", of_rounds), ("base_", of_bases)):
            for place, measure in enumerate(("seconds", "flops", "passes")):
                values = [cost[place] for cost in costs]
                means[name + measure] = statistics.fmean(values) if values else math.nan
        return means


def way_of(axes: Mapping[str, Any], method: str) -> Way:
    """Return the way in which a run was taught.

    Args:
        axes (Mapping[str, Any]): the run's place in the grid.
        method (str): its method.
    """
    _, is_other, number = str(axes["model"]).partition("-n")
    return Way(
        method=method,
        train=axes["train"],
        remember=axes["remember"],
        num_experts=int(number) if is_other else None,
        chooses_rows=bool(axes["chooses_rows"]),
    )


def _order(way: Way) -> tuple[int, ...]:
    methods = [method.name for method in METHODS]
    return (
        methods.index(way.method),
        way.num_experts or 0,
        get_args(Train).index(way.train),
        way.chooses_rows,
        get_args(Remember).index(way.remember),
    )


def _recalls(line: Mapping[str, Any], number: int) -> dict[str, float]:
    earlier = {str(each): line[f"{round_facts(each)}_recall"] for each in range(1, number)}
    return {BASE: line[f"{BASE}_recall"], **earlier, str(number): line["recall"]}


def _at(curve: np.ndarray, learned: float) -> float:
    """Return the share that is kept where a curve first has learned as much."""
    place = int(np.argmax(curve[:, 0] >= learned))
    if not place:
        return float(curve[0, 1])
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return float(y0 + (y1 - y0) * (learned - x0) / (x1 - x0))


def _cost(found: Results) -> tuple[float, float, float]:
    """Return the seconds, the training FLOPs and the passes of a run, own samples counted."""
    seconds, flops = found.last.get("seconds", math.nan), found.last.get("training_flops", math.nan)
    drawn = found.folder / "teaching" / "own-samples.json"
    if drawn.exists():
        took = json.loads(drawn.read_text(encoding="utf-8"))
        seconds += took["seconds"]
        flops += took["sample_tokens"] * (found.run or {}).get("training_flops_per_token", {}).get("total", 0) / 3
    return float(seconds), float(flops), float(len(found.validation) - 1)
