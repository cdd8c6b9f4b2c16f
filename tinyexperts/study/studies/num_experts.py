"""The paper's ablation of the number of experts N."""

from __future__ import annotations

from typing import Any

from tinyexperts.report.table import Table
from tinyexperts.study.analysis.tables import number
from tinyexperts.study.grid import GridRun
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.ablation import Ablation, AblationRuns, one_stage, paper_usage, peer_run
from tinyexperts.study.study import Study


def _runs(scale: Scale) -> list[GridRun]:
    return [
        peer_run(scale, budget, seed, {"num_experts": n}, num_experts=n, changes=changes, **axes)
        for budget in scale.budgets[:2]
        for seed in scale.seeds
        for n in scale.experts
        for changes, axes in _data_sets(scale)
    ]


def _data_sets(scale: Scale) -> list[tuple[dict[str, Any], dict[str, int]]]:
    """Return the change of configuration and the axis of each data set; neither where there is one."""
    return [({"data": data}, {"num_entities": number}) for data, number in scale.num_entities.items()] or [({}, {})]


def _recall_by_entities(found: AblationRuns) -> Table | None:
    """Return the recall by the number of experts (rows) and of entities (columns); None for one data set."""
    if "num_entities" not in found.axes:
        return None
    recall = found.points.pivot(index=["budget", "num_experts"], columns="num_entities", values="recall")
    return Table(
        name="recall-by-entities",
        title="Recall of known facts by the number of experts and of entities, %",
        columns=("FLOPs", "experts", *(f"{entities:,} entities" for entities in recall.columns)),
        rows=tuple(
            (f"{budget:.2g}", f"{experts:,}", *(number(100 * cell, ".1f") for cell in cells))
            for (budget, experts), cells in zip(recall.index, recall.to_numpy(), strict=True)
        ),
        note="Means over seeds. A training budget is spent on the statements of all entities together.",
    )


NUM_EXPERTS = Study(
    name="num-experts",
    summary="The paper's ablation of N at 8 x 16 active experts: do more experts help?",
    question="Do more experts help, at equal active ones?",
    stages=one_stage(_runs),
    compares_data=True,
    findings=Ablation(
        axis="num_experts", claim="more experts reach a lower loss", tables=(paper_usage, _recall_by_entities)
    ).findings,
)
