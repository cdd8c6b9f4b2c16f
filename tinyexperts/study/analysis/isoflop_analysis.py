"""What the isoFLOP study says: each method at its own best size, against the others, and against the paper."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property

from tinyexperts.study.analysis.claim import Claim, verdict_on
from tinyexperts.study.analysis.fits.isoflop_fit import IsoFlopFit, fit_isoflop
from tinyexperts.study.analysis.fits.power_law_fit import SIZE_AND_TOKENS, PowerLawFit, fit_power_law
from tinyexperts.study.analysis.fits.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.analysis.paper_results import paper_margins
from tinyexperts.study.analysis.run_results import method_label
from tinyexperts.study.analysis.study_points import HELD_OUT, Group, Point, flops_without_router, groups_of, losses_at
from tinyexperts.study.scales import METHODS
from tinyexperts.study.study import GridRun

WITHOUT_ROUTER = "held out, router not counted"
AT_EQUAL_TIME = "held out, at equal time"
BASELINES = tuple(method for method in METHODS if method != "peer")


class IsoFlopAnalysis:
    """Groups of seeds by method and budget, each method's best size, and the fits."""

    def __init__(self, points: Sequence[Point], open_runs: Sequence[GridRun] = ()) -> None:
        """open_runs: those that are planned and will have points, when they are done."""
        self._open = [run for run in open_runs if run.axes["stage"] == "main"]
        self.tuning = [point for point in points if point.run.axes["stage"] == "tuning"]
        main = groups_of(point for point in points if point.run.axes["stage"] == "main")
        self.groups = sorted(
            main,
            key=lambda g: (g.first.run.axes["budget"], METHODS.index(g.first.run.method), g.first.run.axes["width"]),
        )
        self.budgets = sorted({float(group.first.run.axes["budget"]) for group in self.groups})

    def of(self, method: str, budget: float) -> list[Group]:
        """By width, ascending."""
        found = [g for g in self.groups if g.first.run.method == method and g.first.run.axes["budget"] == budget]
        return sorted(found, key=lambda group: int(group.first.run.axes["width"]))

    def is_finished(self, method: str, budget: float) -> bool:
        """Whether no run of them is still to come."""
        return not any(run.method == method and run.axes["budget"] == budget for run in self._open)

    def is_compared(self, baseline: str, budget: float) -> bool:
        """Whether no run of PEER or of a baseline is still to come."""
        return self.is_finished("peer", budget) and self.is_finished(baseline, budget)

    def best(self, method: str, budget: float) -> Group | None:
        """The size of least mean loss over the seeds that all sizes have; None where there is no such seed.

        A size that has not been run yet, or only with a seed that ends low, must not decide: while runs are to come the
        seeds count that all sizes have, and when they have ended the sizes that have all seeds.
        """
        groups = self.of(method, budget)
        if not groups:
            return None
        if self.is_finished(method, budget):
            every = set.union(*(set(group.losses()) for group in groups))
            groups = [group for group in groups if set(group.losses()) == every]
        to_come = {run.axes["width"] for run in self._open if run.method == method and run.axes["budget"] == budget}
        seeds = set.intersection(*(set(group.losses()) for group in groups)) if groups else set()
        if not seeds or to_come - {group.first.run.axes["width"] for group in groups}:
            return None
        return min(groups, key=lambda group: math.fsum(group.losses()[seed] for seed in seeds))

    def fit(self, method: str, budget: float, count: str) -> IsoFlopFit | None:
        """The parabola over `count` parameters: total, active or matmul; None without a point."""
        points = [point for group in self.of(method, budget) for point in group.points]
        if not points:
            return None
        return fit_isoflop([getattr(p.cost, f"parameters_{count}") for p in points], [p.loss for p in points])

    def points_of(self, method: str) -> list[Point]:
        """All runs of a method, tuning left out."""
        return [point for group in self.groups if group.first.run.method == method for point in group.points]

    @cached_property
    def laws(self) -> dict[str, PowerLawFit]:
        """L(P, D) of all runs of a method, by method; without those that have fewer different runs than parameters."""
        fits = {}
        for method in METHODS:
            points = self.points_of(method)
            sizes = {"P": [p.cost.parameters_active for p in points], "D": [p.cost.num_tokens for p in points]}
            with contextlib.suppress(ValueError):
                fits[method] = fit_power_law(SIZE_AND_TOKENS, sizes, [p.loss for p in points])
        return fits

    def difference(self, baseline: str, budget: float, text: str = HELD_OUT) -> SeedInterval | None:
        """PEER minus a baseline, nats, each at its own best size."""
        ours, theirs = self.best("peer", budget), self.best(baseline, budget)
        return None if ours is None or theirs is None else paired_difference(ours.losses(text), theirs.losses(text))

    def difference_with_widths_of_other_seeds(self, baseline: str, budget: float) -> SeedInterval | None:
        """PEER minus a baseline, each seed's run at the width that the other seeds say is best.

        So that no run takes part in choosing the width at which it is compared. None with fewer than two seeds.
        """
        ours, theirs = (
            {
                seed: loss
                for seed in self._shared_seeds(m, budget)
                if (loss := self._left_out(m, budget, seed)) is not None
            }
            for m in ("peer", baseline)
        )
        return paired_difference(ours, theirs)

    def _shared_seeds(self, method: str, budget: float) -> set[int]:
        seeds = [set(group.losses()) for group in self.of(method, budget)]
        return set.intersection(*seeds) if seeds else set()

    def _left_out(self, method: str, budget: float, seed: int) -> float | None:
        """The loss of a seed at the width of least mean loss over the others; None without others."""
        others = self._shared_seeds(method, budget) - {seed}
        if not others:
            return None
        best = min(self.of(method, budget), key=lambda group: math.fsum(group.losses()[other] for other in others))
        return best.losses()[seed]

    def difference_of_part(self, baseline: str, budget: float, part: str) -> SeedInterval | None:
        """PEER minus a baseline on a part of the held-out tokens: `new` or `stood_earlier`."""
        ours, theirs = self.best("peer", budget), self.best(baseline, budget)
        if ours is None or theirs is None:
            return None
        by_seed = [{p.seed: p.result.evaluated("loss_by_copy", part) for p in group.points} for group in (ours, theirs)]
        # A text without such tokens has no loss on them.
        kept = [{seed: v for seed, v in values.items() if v is not None and math.isfinite(v)} for values in by_seed]
        return paired_difference(*kept)

    def seconds(self, group: Group) -> float:
        """What a run of a group takes: its tokens, at the median speed of all runs of its method and width.

        One speed for all, since other work beside some of them made their own seconds differ.
        """
        run = group.first.run
        speeds = [
            speed
            for other in self.groups
            if (other.first.run.method, other.first.run.axes["width"]) == (run.method, run.axes["width"])
            for point in other.points
            if (speed := point.result.tokens_per_second) is not None
        ]
        return group.first.cost.num_tokens / statistics.median(speeds) if speeds else math.nan

    def difference_at_equal(self, cost: Callable[[Group], float], baseline: str, budget: float) -> SeedInterval | None:
        """PEER minus what a baseline reaches at the same cost of another kind, each at its best size of each budget.

        The baseline's budgets on both sides must be finished; beyond them nothing is said.
        """
        ours = self.best("peer", budget)
        finished = [b for b in self.budgets if self.is_finished(baseline, b)]
        bests = [best for b in finished if (best := self.best(baseline, b)) is not None]
        reached = None if ours is None else losses_at(cost, cost(ours), bests)
        return None if ours is None or reached is None else paired_difference(ours.losses(), reached)

    def differences(self, baseline: str, budget: float) -> dict[str, SeedInterval]:
        """PEER minus a baseline by what is compared: all tokens, its parts, equal time, and the other texts."""
        texts = dict.fromkeys(text for group in self.groups for text in group.first.losses if text != HELD_OUT)
        found = {
            HELD_OUT: self.difference(baseline, budget),
            "held out, tokens whose bigram is new": self.difference_of_part(baseline, budget, "new"),
            "held out, tokens whose bigram stood earlier": self.difference_of_part(baseline, budget, "stood_earlier"),
            "held out, width by the other seeds": self.difference_with_widths_of_other_seeds(baseline, budget),
            WITHOUT_ROUTER: self.difference_at_equal(flops_without_router, baseline, budget),
            AT_EQUAL_TIME: self.difference_at_equal(self.seconds, baseline, budget),
            **{text: self.difference(baseline, budget, text) for text in texts},
        }
        return {what: difference for what, difference in found.items() if difference is not None}

    def claims(self) -> list[Claim]:
        """A verdict for each baseline at each budget."""
        return [
            verdict_on(
                f"At {budget:.0e} FLOPs PEER reaches a lower loss than {method_label(baseline)}",
                self.difference(baseline, budget),
                is_finished=self.is_compared(baseline, budget),
                margins=paper_margins(baseline),
            )
            for budget in self.budgets
            for baseline in BASELINES
        ]

    def doubts(self) -> list[str]:
        """A sentence for every setting, and every width, whose best is the last tried: a better one may lie beyond.

        And one for each budget of a single width.
        """
        sentences = []
        for budget in self.budgets:
            alone = {m: groups[0].first.run.axes["width"] for m in METHODS if len(groups := self.of(m, budget)) == 1}
            if alone:
                told = ", ".join(f"{method_label(method)} {width}" for method, width in alone.items())
                sentences.append(f"At {budget:.0e} FLOPs one width was run of each ({told}): a better one may exist.")
            for method in METHODS:
                widths = [int(group.first.run.axes["width"]) for group in self.of(method, budget)]
                best = self.best(method, budget)
                if (
                    best is not None
                    and len(widths) > 1
                    and (width := best.first.run.axes["width"]) in widths[:: len(widths) - 1]
                ):
                    told = f"the best width at {budget:.0e} FLOPs is the last that was tried, {width}"
                    sentences.append(f"{method_label(method)}: {told}.")
        for method in METHODS:
            found = {tuning_label(point): point.loss for point in self.tuning if point.run.method == method}
            default = found.pop("default", math.inf)
            for setting in dict.fromkeys(label.rsplit("-x", 1)[0] for label in found):
                losses = {1.0: default} | {
                    float(label.rsplit("-x", 1)[1]): loss
                    for label, loss in found.items()
                    if label.rsplit("-x", 1)[0] == setting
                }
                factor = min(losses, key=lambda factor: losses[factor])
                if factor != 1.0 and factor in (min(losses), max(losses)):
                    told = f"the best {setting} is the last that was tried, {factor:g} times the default"
                    sentences.append(f"{method_label(method)}: {told}.")
        return sentences


def tuning_label(point: Point) -> str:
    """Of a tuning run: `default`, or a setting and its factor, as in `head-x2`."""
    return point.run.name.removeprefix(f"tune-{point.run.method}-").rsplit("-seed", 1)[0]
