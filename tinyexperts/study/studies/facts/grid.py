"""The grid of the study of facts: that of isoflop on sizes of its own, then fresh seeds at each best width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tinyexperts.study.grid import GridRun, Stage
from tinyexperts.study.scales import Scale, ScaleName
from tinyexperts.study.studies.isoflop import grid as isoflop
from tinyexperts.training.config import with_settings

# Seeds that took no part in the choice of the widths at which they are compared.
FRESH_SEEDS = (10, 11, 12, 13, 14)

# The sizes that differ from a scale's own: statements are short, and small models store what a table does not.
_SIZES: Mapping[ScaleName, dict[str, Any]] = {
    "laptop": {
        "widths": {2.5e12: (16, 32, 48, 64), 1e13: (16, 32, 48, 64, 96), 3e13: (16, 32, 48, 64, 96)},
        "last_budget": None,
        "peer_settings": {},
    },
}
_SETTINGS: Mapping[ScaleName, dict[str, Any]] = {
    "laptop": {"model.context_length": 128, "batch_size": 8},
}


def facts_scale(scale: Scale) -> Scale:
    """Return a scale with the sizes of this study."""
    base = with_settings(scale.base, _SETTINGS.get(scale.name, {}))
    return replace(scale, base=base, **_SIZES.get(scale.name, {}))


def stages(scale: Scale) -> tuple[Stage, ...]:
    """Return the stages: tuning, its squares, every width and budget, and fresh seeds at each best width."""
    scale = facts_scale(scale)
    tune, tune_further, measure, extend = isoflop.stages(scale)

    def confirm(losses: Mapping[str, float]) -> list[GridRun]:
        return [
            isoflop.tuned_run(scale, method, width=width, budget=budget, seed=seed, stage="fresh", losses=losses)
            for budget in scale.budgets
            for seed in FRESH_SEEDS
            for method in scale.layers
            if (width := isoflop.best_width(scale, method, losses, budget)) is not None
        ]

    return tune, tune_further, measure, extend, confirm
