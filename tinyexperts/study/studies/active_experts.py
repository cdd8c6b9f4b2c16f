"""The paper's ablation of the active experts, heads x experts a head, and the law that grows out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinyexperts.comparison.frame import HELD_OUT
from tinyexperts.report.table import Table
from tinyexperts.statistics.power_law_fit import WITH_GRANULARITY, fit_power_law
from tinyexperts.study.analysis.tables import LAW_NOTE, law_cells, law_columns, missing_law_cells
from tinyexperts.study.grid import GridRun
from tinyexperts.study.scales import Scale
from tinyexperts.study.studies.ablation import Ablation, AblationRuns, one_stage, peer_run
from tinyexperts.study.study import Study

_CLAIM = "more active experts reach a lower loss"


def _runs(widths: Callable[[Scale, float], Sequence[int]]) -> Callable[[Scale], list[GridRun]]:
    return lambda scale: [
        peer_run(
            scale, budget, seed, {"num_heads": heads, "experts_per_head": k},
            width=width, heads=heads, experts_per_head=k, active=heads * k,
        )
        for budget in scale.budgets[:2]
        for seed in scale.seeds
        for width in widths(scale, budget)
        for heads, k in scale.active
    ]  # fmt: skip


def _law(found: AblationRuns) -> Table:
    runs = found.runs.done.sort_values([*found.others("active"), "active", "seed"])
    variables = {"P": runs.parameters_active, "D": runs.num_tokens, "G": runs.active}
    try:
        fit = fit_power_law(WITH_GRANULARITY, variables, runs[HELD_OUT])
    except ValueError as error:
        cells = missing_law_cells(WITH_GRANULARITY, str(error))
    else:
        cells = law_cells(fit, is_finished=found.runs.to_come.empty)
    return Table(
        name="granularity-law",
        title="L(P, D, G) = c + (g / G^gamma + a) / P^alpha + b / D^beta",
        columns=law_columns(WITH_GRANULARITY),
        rows=(cells,),
        note=f"P active parameters, D tokens, G active experts. {LAW_NOTE}",
    )


ACTIVE_EXPERTS = Study(
    name="active-experts",
    summary="The paper's ablation of h x k: do more active experts help?",
    question="Do more active experts help, out of as many?",
    stages=one_stage(_runs(lambda scale, budget: (scale.middle_width,))),
    findings=Ablation(axis="active", claim=_CLAIM).findings,
)
GRANULARITY = Study(
    name="granularity",
    summary="Sizes, tokens and active experts all vary, for the law L(P, D, G) that the paper builds on.",
    question="How does the loss fall with size, tokens and granularity?",
    stages=one_stage(_runs(lambda scale, budget: scale.widths[budget])),
    findings=Ablation(axis="active", claim=_CLAIM, tables=(_law,)).findings,
)
