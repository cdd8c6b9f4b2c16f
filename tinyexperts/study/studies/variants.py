"""What the paper names or leaves open about the layer, one change at a time, at equal training FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyexperts.study.grid import GridRun
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.ablation import Ablation, one_stage, peer_run
from tinyexperts.study.study import Study

_PAPER = "paper"
# Name -> changes of the layer.
_LAYERS: Mapping[str, Mapping[str, Any]] = {
    _PAPER: {},
    "gated": {"gated": True},
    "sigmoid": {"router_weights": "sigmoid"},
    "relu": {"router_weights": "relu"},
    "own-sub-keys": {"shared_sub_keys": False},
    "query-layer-norm": {"query_norm": "layer"},
    "no-query-norm": {"query_norm": "none"},
}


def _runs(scale: Scale) -> list[GridRun]:
    num_layers = scale.base.model.num_layers
    blocks = {"two-blocks": (num_layers // 2 - 1, num_layers // 2), "all-blocks": tuple(range(num_layers))}
    variants: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        **{name: (changes, {}) for name, changes in _LAYERS.items()},
        **{name: ({}, {"model.expert_blocks": numbers}) for name, numbers in blocks.items()},
    }
    return [
        peer_run(scale, budget, seed, of_layer, changes=of_run, variant=name)
        for budget in scale.budgets[:2]
        for seed in scale.seeds
        for name, (of_layer, of_run) in variants.items()
    ]


VARIANTS = Study(
    name="variants",
    summary="Gated experts, other router weights, norms and sub-keys, more blocks: one change at a time.",
    question="Which change of the layer helps, at equal training FLOPs?",
    stages=one_stage(_runs),
    findings=Ablation(
        axis="variant",
        values=(*_LAYERS, "two-blocks", "all-blocks"),
        reference=lambda run: run.axes["variant"] == _PAPER,
        reference_name="paper's layer",
    ).findings,
)
