"""The paper's ablation of the number of experts N."""

from __future__ import annotations

from tinyexperts.study.grid import GridRun
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.ablation import Ablation, one_stage, paper_usage, peer_run
from tinyexperts.study.study import Study


def _runs(scale: Scale) -> list[GridRun]:
    return [
        peer_run(scale, budget, seed, {"num_experts": n}, num_experts=n)
        for budget in scale.budgets[:2]
        for seed in scale.seeds
        for n in scale.experts
    ]


NUM_EXPERTS = Study(
    name="num-experts",
    summary="The paper's ablation of N at 8 x 16 active experts: do more experts help?",
    question="Do more experts help, at equal active ones?",
    stages=one_stage(_runs),
    findings=Ablation(axis="num_experts", claim="more experts reach a lower loss", tables=(paper_usage,)).findings,
)
