"""The grid of the study of facts: isoflop's tuning, then by budget the widths around the best, and fresh seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from tinyexperts.statistics.seed_interval import paired_difference
from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.isoflop import grid as isoflop
from tinyexperts.training.compilation import COMPILE_FROM_FLOPS

# Seeds that took no part in the choice of the widths at which they are compared; fewer at the last budget, which costs
# as much as all others.
FRESH_SEEDS = (10, 11, 12, 13, 14)
LAST_SEEDS = FRESH_SEEDS[:3]
# At most so many seeds more, where the interval of a difference reaches further than half of the difference.
MAX_FURTHER_SEEDS = 7
# A best width at the end of those tried moves by a step of the grid, at most so often.
_MAX_MOVES = 2


def stages(scale: Scale) -> tuple[Stage, ...]:
    """Return the stages: tuning, then by budget the widths around the best, and fresh seeds at the best.

    A setting is tuned on, by further powers of a factor, while its best value is the last one tried. Then each method
    is timed at its best widths. The last budget is spent on fresh seeds alone, at the best widths of the budget before.
    """
    tune, *_ = isoflop.stages(scale)
    tune_on = [isoflop.tuned_on(scale, power) for power in range(2, isoflop.MAX_POWER + 1)]
    of_budgets: list[Stage] = []
    for budget in scale.budgets:
        of_budgets.append(partial(_runs_around_best, scale, budget))
        of_budgets += [partial(_runs_beyond_ends, scale, budget)] * _MAX_MOVES
        of_budgets += [partial(_fresh_runs, scale, budget), partial(_further_fresh_runs, scale, budget)]
    return tune, *tune_on, *of_budgets, partial(_timed_runs, scale), partial(_last_runs, scale)


def _runs_around_best(scale: Scale, budget: float, losses: Mapping[str, float]) -> list[GridRun]:
    """Return the runs at each method's best width of the budget before, and at its neighbors; first at every width."""
    grid = scale.widths[budget]
    before = [other for other in scale.budgets if other < budget]
    widths: dict[str, Sequence[int]] = dict.fromkeys(scale.layers, grid)
    for method in scale.layers:
        best = isoflop.best_width(scale, method, losses, before[-1]) if before else None
        if best in grid:
            place = grid.index(best)
            widths[method] = grid[max(0, place - 1) : place + 2]
    return isoflop.runs_at(scale, budget, widths, losses)


def _runs_beyond_ends(scale: Scale, budget: float, losses: Mapping[str, float]) -> list[GridRun]:
    """Return the runs at the next width of each method whose best is at an end of those that it has tried."""
    grid = scale.widths[budget]
    widths: dict[str, Sequence[int]] = {}
    for method in scale.layers:
        means = isoflop.losses_by_width(scale, method, losses, budget)
        best = isoflop.best_width(scale, method, losses, budget)
        if best is None:
            continue
        wider, narrower = [width for width in grid if width > best], [width for width in grid if width < best]
        widths[method] = [
            *(narrower[-1:] if best == min(means) else ()),
            *(wider[:1] if best == max(means) else ()),
        ]
    return isoflop.runs_at(scale, budget, widths, losses)


def _fresh_runs(scale: Scale, budget: float, losses: Mapping[str, float]) -> list[GridRun]:
    return _runs_at_best_widths(scale, budget, FRESH_SEEDS, losses, chosen_at=budget)


def _further_fresh_runs(scale: Scale, budget: float, losses: Mapping[str, float]) -> list[GridRun]:
    """Return as many more seeds as each of PEER's differences needs for an interval of half of it to both sides.

    The deviation of the first seeds says how many. A difference that would need more than MAX_FURTHER_SEEDS gets none.
    """
    by_seed: dict[str, dict[int, float]] = {method: {} for method in scale.layers}
    for run in _fresh_runs(scale, budget, losses):
        if run.name in losses:
            by_seed[run.method][run.config.seed] = losses[run.name]
    needed = [
        difference.num_values_for(abs(difference.mean) / 2, at_most=len(FRESH_SEEDS) + MAX_FURTHER_SEEDS)
        for method in scale.layers
        if method != "peer" and (difference := paired_difference(by_seed["peer"], by_seed[method]))
    ]
    seeds = range(FRESH_SEEDS[-1] + 1, FRESH_SEEDS[0] + max((n for n in needed if n is not None), default=0))
    return _runs_at_best_widths(scale, budget, seeds, losses, chosen_at=budget)


def timed_budget(budget: float) -> float:
    """Return the training FLOPs of the run that tells the speed of runs of a budget: enough to be compiled alike."""
    return min(budget, COMPILE_FROM_FLOPS)


def _timed_runs(scale: Scale, losses: Mapping[str, float]) -> list[GridRun]:
    """Return a run of each method at each of its best widths, with no other run beside it."""
    runs = [
        isoflop.tuned_run(
            *(scale, method),
            width=width,
            budget=timed_budget(budget),
            seed=FRESH_SEEDS[0],
            stage="timed",
            losses=losses,
        )
        for budget in scale.budgets
        for method in scale.layers
        if (width := isoflop.best_width(scale, method, losses, budget)) is not None
    ]
    return [replace(run, name=f"timed-{run.name}", is_alone=True) for run in {run.name: run for run in runs}.values()]


def _last_runs(scale: Scale, losses: Mapping[str, float]) -> list[GridRun]:
    if scale.last_budget is None:
        return []
    return _runs_at_best_widths(scale, scale.last_budget, LAST_SEEDS, losses, chosen_at=scale.budgets[-1])


def _runs_at_best_widths(
    scale: Scale, budget: float, seeds: Sequence[int], losses: Mapping[str, float], *, chosen_at: float
) -> list[GridRun]:
    """Return a run of each seed and method, at the width that is the method's best at the budget `chosen_at`."""
    return [
        isoflop.tuned_run(scale, method, width=width, budget=budget, seed=seed, stage="fresh", losses=losses)
        for seed in seeds
        for method in scale.layers
        if (width := isoflop.best_width(scale, method, losses, chosen_at)) is not None
    ]
