"""What the isoFLOP study says: each method at its own best size, against the others, and against the paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from tinyexperts.study.fits.compute_multiplier import compute_multiplier
from tinyexperts.study.fits.isoflop_fit import IsoFlopFit, fit_isoflop
from tinyexperts.study.fits.power_law_fit import SIZE_AND_TOKENS, PowerLawFit, fit_power_law
from tinyexperts.study.fits.seed_interval import SeedInterval, paired_difference
from tinyexperts.study.grids.grid import GridRun
from tinyexperts.study.grids.scales import METHODS
from tinyexperts.study.reports.claim import Claim, interval_told, judged
from tinyexperts.study.reports.comparison import signed
from tinyexperts.study.reports.report import format_count
from tinyexperts.study.reports.run_results import method_label
from tinyexperts.study.reports.study_points import HELD_OUT, Group, Point, groups_of
from tinyexperts.study.reports.table import MISSING, Table

BASELINES = tuple(method for method in METHODS if method != "peer")
# Perplexity of each method's compute-optimal model in the paper, by budget and text.
PAPER_TEXTS = ("Curation", "Lambada", "Pile", "Wikitext", "C4")
PAPER_PERPLEXITY: Mapping[float, Mapping[str, tuple[float, ...]]] = {
    6e18: {
        "dense": (23.26, 21.95, 24.55, 29.14, 23.84),
        "moe": (20.98, 19.09, 23.26, 26.10, 21.41),
        "pkm": (21.80, 19.39, 20.49, 27.09, 21.92),
        "peer": (20.68, 17.65, 19.01, 25.48, 20.63),
    },
    2e19: {
        "dense": (17.70, 12.28, 18.19, 21.21, 18.31),
        "moe": (16.88, 12.97, 17.41, 20.28, 17.12),
        "pkm": (17.03, 11.18, 16.34, 20.26, 17.36),
        "peer": (16.34, 10.33, 14.99, 19.09, 16.45),
    },
}


class IsoFlopAnalysis:
    """Groups of seeds by method and budget, each method's best size, and the fits."""

    def __init__(self, points: Sequence[Point], open_runs: Sequence[GridRun] = ()) -> None:
        """open_runs: those that are planned and will have points, when they are done."""
        self._open = [run for run in open_runs if run.axes["stage"] == "main"]
        self.tuning = [point for point in points if point.run.axes["stage"] == "tuning"]
        self.groups = groups_of(point for point in points if point.run.axes["stage"] == "main")
        self.budgets = sorted({float(group.first.run.axes["budget"]) for group in self.groups})

    def of(self, method: str, budget: float) -> list[Group]:
        """By width, ascending."""
        found = [g for g in self.groups if g.first.run.method == method and g.first.run.axes["budget"] == budget]
        return sorted(found, key=lambda group: int(group.first.run.axes["width"]))

    def is_finished(self, method: str, budget: float) -> bool:
        """Whether no run of them is still to come."""
        return not any(run.method == method and run.axes["budget"] == budget for run in self._open)

    def best(self, method: str, budget: float) -> Group | None:
        """The size of least mean loss over the seeds that all sizes have; None while a size shares none with others.

        A size that has only been run with a seed that ends low, or has not been run yet, must not decide.
        """
        groups = self.of(method, budget)
        widths = {group.first.run.axes["width"] for group in groups}
        to_come = {run.axes["width"] for run in self._open if run.method == method and run.axes["budget"] == budget}
        seeds = set.intersection(*(set(group.losses()) for group in groups)) if groups else set()
        if not seeds or to_come - widths:
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

    def law(self, method: str) -> PowerLawFit | None:
        """L(P, D) of all runs of a method; None where they are fewer than its parameters."""
        points = self.points_of(method)
        sizes = {"P": [p.cost.parameters_active for p in points], "D": [p.cost.num_tokens for p in points]}
        try:
            return fit_power_law(SIZE_AND_TOKENS, sizes, [p.loss for p in points])
        except ValueError:
            return None

    def difference(self, baseline: str, budget: float, text: str = HELD_OUT) -> SeedInterval | None:
        """PEER minus a baseline, nats, each at its own best size."""
        ours, theirs = self.best("peer", budget), self.best(baseline, budget)
        return None if ours is None or theirs is None else paired_difference(ours.losses(text), theirs.losses(text))

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

    def difference_at_equal_time(self, baseline: str, budget: float) -> SeedInterval | None:
        """PEER minus what a baseline reaches in the same seconds, each at its best size of each budget.

        Between two of its budgets the baseline's loss is taken as linear in the logarithm of the seconds; beyond them
        nothing is said.
        """
        ours = self.best("peer", budget)
        bests = [best for b in self.budgets if (best := self.best(baseline, b)) is not None]
        if ours is None or len(bests) < 2:
            return None
        times, now = [self.seconds(best) for best in bests], self.seconds(ours)
        rising = all(earlier < later for earlier, later in pairwise(times))  # never of a time that is not a number
        if not rising or not times[0] <= now <= times[-1]:
            return None
        at = {
            seed: float(np.interp(math.log(now), np.log(times), [best.losses()[seed] for best in bests]))
            for seed in set.intersection(*(set(best.losses()) for best in bests))
        }
        return paired_difference(ours.losses(), at)

    def differences(self, baseline: str, budget: float) -> dict[str, SeedInterval]:
        """PEER minus a baseline by what is compared: all tokens, its parts, equal time, and the other texts."""
        texts = dict.fromkeys(text for group in self.groups for text in group.first.losses if text != HELD_OUT)
        found = {
            HELD_OUT: self.difference(baseline, budget),
            "held out, tokens whose bigram is new": self.difference_of_part(baseline, budget, "new"),
            "held out, tokens whose bigram stood earlier": self.difference_of_part(baseline, budget, "stood_earlier"),
            "held out, at equal time": self.difference_at_equal_time(baseline, budget),
            **{text: self.difference(baseline, budget, text) for text in texts},
        }
        return {what: difference for what, difference in found.items() if difference is not None}

    def tables(self) -> list[Table]:
        return [
            self._perplexities(),
            self._differences(),
            self._multipliers(),
            self._optima(),
            self._laws(),
            self._points(),
            self._flops(),
            self._tuning(),
        ]

    def claims(self) -> list[Claim]:
        """A verdict for each baseline at each budget."""
        return [
            judged(
                f"At {budget:.0e} FLOPs PEER reaches a lower loss than {method_label(baseline)}",
                self.difference(baseline, budget),
                is_finished=all(self.is_finished(method, budget) for method in ("peer", baseline)),
            )
            for budget in self.budgets
            for baseline in BASELINES
        ]

    def doubts(self) -> list[str]:
        """A sentence for every setting, and every width, whose best is the last tried: a better one may lie beyond."""
        sentences = []
        for budget in self.budgets:
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
            found = {_tuning_label(point): point.loss for point in self.tuning if point.run.method == method}
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

    def _perplexities(self) -> Table:
        texts = list(dict.fromkeys(text for group in self.groups for text in group.first.losses))
        rows = []
        for budget in self.budgets:
            for method in METHODS:
                best = self.best(method, budget)
                if best is not None:
                    values = tuple(f"{math.exp(best.mean_loss(text)):.2f}" for text in texts)
                    width, blank = str(best.first.run.axes["width"]), (MISSING,) * len(PAPER_TEXTS)
                    rows.append((f"{budget:.0e}", method_label(method), width, *values, *blank))
        for budget, by_method in PAPER_PERPLEXITY.items():
            for method, perplexities in by_method.items():
                blank = (MISSING,) * (1 + len(texts))
                rows.append((f"paper, {budget:.0e}", method_label(method), *blank, *map("{:.2f}".format, perplexities)))
        return Table(
            name="perplexity",
            title="Perplexity of each method at its own best size",
            columns=("FLOPs", "method", "width", *texts, *PAPER_TEXTS),
            rows=tuple(rows),
            note="Of the mean loss over seeds. The paper's texts and tokens are others: compare the order. A mixture "
            "of experts is evaluated by thresholds, which let no token see later ones; it trains by expert choice.",
        )

    def _differences(self) -> Table:
        outcome = {"undecided": "no difference shown", "lower": "PEER lower", "higher": "PEER higher"}
        rows = [
            (f"{budget:.0e}", method_label(baseline), what, *_interval(found), outcome[found.outcome])
            for budget in self.budgets
            for baseline in BASELINES
            for what, found in self.differences(baseline, budget).items()
        ]
        return Table(
            name="differences",
            title="PEER minus each baseline, nats a token, each at its own best size",
            columns=("FLOPs", "baseline", "on", "mean", "deviation over seeds", "95 % interval", "outcome"),
            rows=tuple(rows),
            note=f"Paired by seed. A difference whose interval holds zero is no win, and of {len(rows)} intervals at "
            "95 % one in twenty leaves zero out by chance. At equal time: what the baseline reaches in PEER's seconds, "
            "between two of its budgets; a method's seconds are its tokens at the median speed of its runs of that "
            "width.",
        )

    def _multipliers(self) -> Table:
        by_seed: dict[int, dict[float, float]] = {}
        for budget in self.budgets:
            best = self.best("dense", budget)
            for seed, loss in best.losses().items() if best else ():
                by_seed.setdefault(seed, {})[budget] = loss
        rows = []
        for budget in self.budgets:
            for method in METHODS[1:]:
                best = self.best(method, budget)
                if best is None:
                    continue
                found = compute_multiplier(by_seed, best.losses(), budget)
                value = MISSING if found.value is None else f"{found.value:.2f}"
                interval = MISSING if found.interval is None else f"{found.interval[0]:.2f} to {found.interval[1]:.2f}"
                rows.append((f"{budget:.0e}", method_label(method), value, interval, found.refusal or ""))
        return Table(
            name="compute-multiplier",
            title="How many times more FLOPs dense needs for the same loss",
            columns=("FLOPs", "method", "multiplier", "95 % interval", "why none"),
            rows=tuple(rows),
        )

    def _optima(self) -> Table:
        rows = []
        for budget in self.budgets:
            for method in METHODS:
                for count in ("active", "total", "matmul"):
                    fit = self.fit(method, budget, count)
                    if fit is None:
                        continue
                    optimum = MISSING if fit.optimum is None else format_count(fit.optimum)
                    ends = fit.optimum_interval
                    interval = MISSING if ends is None else f"{format_count(ends[0])} to {_open(ends[1])}"
                    loss = MISSING if fit.loss_at_optimum is None else f"{fit.loss_at_optimum:.3f}"
                    left = f"{math.sqrt(float((fit.residuals**2).mean())):.3f}" if fit.has_curve else MISSING
                    why = fit.refusal or ""
                    rows.append((f"{budget:.0e}", method_label(method), count, optimum, interval, loss, left, why))
        return Table(
            name="optimum",
            title="The size of least loss, by a parabola in its logarithm",
            columns=(
                "FLOPs",
                "method",
                "parameters",
                "optimum",
                "95 % interval",
                "loss there",
                "residuals, nats (RMS)",
                "why none",
            ),
            rows=tuple(rows),
        )

    def _laws(self) -> Table:
        rows = []
        for method in METHODS:
            fit = self.law(method)
            if fit is None:
                few = f"a law of five parameters, and {len(self.points_of(method))} runs"
                rows.append((method_label(method), *(MISSING,) * 4, few))
                continue
            deviation = math.sqrt(float((fit.residuals**2).mean()))
            doubt = f"the runs do not determine {' and '.join(fit.at_bounds)}" if fit.at_bounds else ""
            exponents = (f"{fit.exponents['alpha']:.3f}", f"{fit.exponents['beta']:.3f}")
            rows.append((method_label(method), f"{fit.constant:.3f}", *exponents, f"{deviation:.3f}", doubt))
        return Table(
            name="scaling-law",
            title="L(P, D) = c + a / P^alpha + b / D^beta, P active parameters, D tokens",
            columns=("method", "c", "alpha", "beta", "residuals, nats (root mean square)", "doubt"),
            rows=tuple(rows),
        )

    def _points(self) -> Table:
        rows = []
        for group in self.groups:
            run, cost, deviation = group.first.run, group.first.cost, group.standard_deviation()
            flops = cost.forward_flops
            without = cost.training_flops * (1 - flops.router / flops.total)
            rows.append(
                (
                    method_label(run.method),
                    f"{run.axes['budget']:.0e}",
                    str(run.axes["width"]),
                    *(format_count(n) for n in (cost.parameters_active, cost.parameters_total, cost.parameters_matmul)),
                    format_count(cost.num_tokens),
                    f"{cost.training_flops:.3e}",
                    f"{without:.3e}",
                    format_count(cost.forward_bytes),
                    f"{group.mean_loss():.3f}",
                    MISSING if deviation is None else f"{deviation:.3f}",
                    *group.usage_told(),
                    str(len(group.points)),
                )
            )
        return Table(
            name="points",
            title="Every size and budget",
            columns=(
                *("method", "budget", "width", "active", "total", "matmul parameters", "tokens", "training FLOPs"),
                *("without router", "bytes a token, forward", "loss", "deviation over seeds"),
                *("usage, %", "unevenness, nats", "seeds"),
            ),
            rows=tuple(rows),
        )

    def _flops(self) -> Table:
        rows = {}
        for group in self.groups:
            flops, run = group.first.cost.forward_flops, group.first.run
            parts = (flops.attention, flops.dense_layers, flops.query_network, flops.sub_key_scores, flops.experts)
            shares = (f"{part / flops.total:.1%}" for part in (*parts, flops.head))
            head = (method_label(run.method), str(run.axes["width"]))
            rows[head] = (*head, format_count(flops.total), *shares)
        return Table(
            name="flops",
            title="FLOPs a token of a forward pass, by module",
            columns=(
                *("method", "width", "FLOPs", "attention", "dense layers", "query network or router"),
                *("sub-key scores", "experts", "head"),
            ),
            rows=tuple(rows.values()),
            note="Training costs three times as much.",
        )

    def _tuning(self) -> Table:
        rows = []
        for point in self.tuning:
            seconds = point.result.last.get("seconds", math.nan)
            rows.append((method_label(point.run.method), _tuning_label(point), f"{point.loss:.3f}", f"{seconds:,.0f}"))
        return Table(
            name="tuning",
            title="Tuning: one seed at the smallest budget and the middle width",
            columns=("method", "setting", "loss", "seconds"),
            rows=tuple(rows),
            note="Each setting is changed by itself, and twice as far where that was best; the best value of each is "
            "taken, all together.",
        )


def _tuning_label(point: Point) -> str:
    """Of a tuning run: `default`, or a setting and its factor, as in `head-x2`."""
    return point.run.name.removeprefix(f"tune-{point.run.method}-").rsplit("-seed", 1)[0]


def _interval(found: SeedInterval) -> tuple[str, str, str]:
    deviation = found.standard_deviation
    return signed(found.mean), MISSING if deviation is None else f"{deviation:.3f}", interval_told(found)


def _open(value: float) -> str:
    return "open" if math.isinf(value) else format_count(value)
