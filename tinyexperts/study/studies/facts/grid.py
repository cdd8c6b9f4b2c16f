"""The grid of the study of facts: that of isoflop on sizes of its own, then fresh seeds at each best width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.isoflop import grid as isoflop

# Seeds that took no part in the choice of the widths at which they are compared; fewer at the last budget, which costs
# as much as all others.
FRESH_SEEDS = (10, 11, 12, 13, 14)
LAST_SEEDS = FRESH_SEEDS[:3]


def stages(scale: Scale) -> tuple[Stage, ...]:
    """Return the stages: tuning, its squares, then by budget every width, and fresh seeds at each best width.

    The last budget is spent on fresh seeds alone, at the best widths of the budget before.
    """
    tune, tune_further, *_ = isoflop.stages(scale)
    of_budgets: list[Stage] = []
    for budget in scale.budgets:
        of_budgets += [partial(isoflop.runs_of_budget, scale, budget), partial(_fresh_runs, scale, budget)]
    return tune, tune_further, *of_budgets, partial(_last_runs, scale)


def _fresh_runs(scale: Scale, budget: float, losses: Mapping[str, float]) -> list[GridRun]:
    return _runs_at_best_widths(scale, budget, FRESH_SEEDS, losses, chosen_at=budget)


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
