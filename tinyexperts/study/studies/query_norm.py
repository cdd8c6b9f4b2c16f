"""The paper's ablation of query batch normalization, and its table of how the experts are used."""

from __future__ import annotations

from dataclasses import replace

from tinyexperts.study.grid import GridRun
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.ablation import Ablation, one_stage, paper_usage, peer_run
from tinyexperts.study.study import Study


def _runs(scale: Scale) -> list[GridRun]:
    return [
        peer_run(
            scale, scale.tuning_budget, seed, {"num_experts": n, "query_norm": norm}, num_experts=n, query_norm=norm
        )
        for seed in scale.seeds
        for n in scale.experts
        for norm in ("batch", "none")
    ]


_ABLATION = Ablation(
    axis="query_norm",
    claim="batch normalisation of the queries lowers the loss",
    values=("none", "batch"),
    tables=(paper_usage,),
)
QUERY_NORM = Study(
    name="query-norm",
    summary="The paper's ablation of query batch normalization, by the number of experts.",
    question="Does batch normalization of the queries help, by the number of experts?",
    stages=one_stage(_runs),
    findings=_ABLATION.findings,
)
USAGE = Study(
    name="usage",
    summary="The paper's table of perplexity, usage and unevenness by the number of experts, by query norm.",
    question="How many experts are used and how evenly, by their number, with and without query norm?",
    stages=one_stage(_runs),
    findings=replace(_ABLATION, unevenness_claim="it makes the experts' use more even").findings,
)
