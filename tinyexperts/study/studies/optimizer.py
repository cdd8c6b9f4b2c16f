"""A question that the paper leaves open: row-sparse or dense Adam on the tables, and at which learning rate?"""

from __future__ import annotations

from typing import Any

from tinyexperts.comparison.findings import difference_cells
from tinyexperts.report.table import Table
from tinyexperts.study.analysis.tables import RESULT_COLUMNS, result_cells
from tinyexperts.study.grid import GridRun
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.ablation import Ablation, AblationRuns, one_stage, peer_run, value_text
from tinyexperts.study.study import Study

_KINDS: tuple[dict[str, Any], ...] = (
    {"optimizer.table_gradients": "sparse"},
    {"optimizer.table_gradients": "dense"},
    {"optimizer.table_gradients": "sparse", "optimizer.table_second_moment": "row"},
)


def _runs(scale: Scale) -> list[GridRun]:
    rate = scale.peer_settings.get("optimizer.table_learning_rate", scale.base.optimizer.table_learning_rate)
    return [
        peer_run(
            scale, scale.tuning_budget, seed, {}, changes={**kind, "optimizer.table_learning_rate": rate * factor},
            optimizer="-".join(kind.values()), table_learning_rate=rate * factor,
        )
        for seed in scale.seeds
        for kind in _KINDS
        for factor in (0.3, 1.0, 3.0)
    ]  # fmt: skip


def _optimizers(found: AblationRuns) -> Table:
    """Return the table of each optimizer at its own best rate, against the first of them."""
    best: dict[str, Any] = {}
    for points in found.series().values():
        rates = list(points.itertuples())
        seeds = sorted(set.intersection(*(set(found.by_seed(rate).index) for rate in rates)))
        if seeds:
            best[rates[0].optimizer] = min(rates, key=lambda rate: found.by_seed(rate)[seeds].mean())
    reference = best.get("sparse")
    differences = {
        name: None if reference is None or point is reference else found.difference(point, reference)
        for name, point in best.items()
    }
    return Table(
        name="optimizers",
        title="Each optimizer of the tables at its own best rate",
        columns=("optimizer", "table learning rate", *RESULT_COLUMNS, "loss against sparse", "95 % interval"),
        rows=tuple(
            (name, value_text(point.table_learning_rate), *result_cells(point), *difference_cells(differences[name]))
            for name, point in best.items()
        ),
        note="sparse: Adam on touched rows; sparse-row: with one second moment a row; dense: AdamW on all of them.",
    )


OPTIMIZER = Study(
    name="optimizer",
    summary="Row-sparse or dense Adam on the tables, and at which learning rate? The paper does not say.",
    question="Row-sparse or dense Adam on the tables, and at which learning rate?",
    stages=one_stage(_runs),
    findings=Ablation(axis="table_learning_rate", tables=(_optimizers,)).findings,
)
