"""Figure 1 and the first table of the paper: dense, expert-choice MoE, PKM and PEER at equal training FLOPs."""

from __future__ import annotations

from tinyexperts.report.page import Findings, Section
from tinyexperts.study.analysis.frame import StudyRuns
from tinyexperts.study.studies.isoflop.analysis import IsoFlopAnalysis
from tinyexperts.study.studies.isoflop.figures import isoflop_figures
from tinyexperts.study.studies.isoflop.grid import stages
from tinyexperts.study.studies.isoflop.tables import isoflop_tables
from tinyexperts.study.study import Study


def _findings(runs: StudyRuns) -> Findings:
    analysis = IsoFlopAnalysis(runs)
    return Findings(
        findings=analysis.claims(),
        sections=[
            Section(title="Curves", drawings=tuple(isoflop_figures(analysis))),
            *(Section(title=table.title, tables=(table,)) for table in isoflop_tables(analysis)),
        ],
        doubts=analysis.doubts(),
        repeatable=[*analysis.points.name, *analysis.tuning.name],
    )


ISOFLOP = Study(
    name="isoflop",
    summary="Figure 1 and Table 1 of the paper: dense, expert-choice MoE, PKM and PEER at equal training FLOPs.",
    question="At equal training FLOPs, does PEER reach a lower loss than dense, expert-choice MoE and PKM?",
    stages=stages,
    findings=_findings,
)
