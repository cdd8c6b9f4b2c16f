"""A question that the paper leaves open: which block should carry the experts?"""

from __future__ import annotations

from dataclasses import replace

from tinyexperts.study.grid import GridRun
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.ablation import Ablation, one_stage, peer_run
from tinyexperts.study.study import Study


def _runs(scale: Scale) -> list[GridRun]:
    return [
        peer_run(scale, scale.tuning_budget, seed, {}, changes={"model.expert_blocks": (block,)}, block=block)
        for seed in scale.seeds
        for block in range(scale.base.model.num_layers)
    ]


def _is_middle_block(run: GridRun) -> bool:
    return replace(run.config.model, expert_blocks=None).blocks_with_experts == (run.axes["block"],)


PLACEMENT = Study(
    name="placement",
    summary="Which block should carry the experts? The paper takes the middle one.",
    question="Which block should carry the experts?",
    stages=one_stage(_runs),
    findings=Ablation(axis="block", reference=_is_middle_block, reference_name="middle block").findings,
)
