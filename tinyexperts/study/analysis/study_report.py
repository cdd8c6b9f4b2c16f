"""The report of a study: one self-contained HTML file, and its tables as CSV and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically
from tinyexperts.report.style import Drawing
from tinyexperts.study.analysis.ablation_analysis import AblationAnalysis
from tinyexperts.study.analysis.isoflop_analysis import IsoFlopAnalysis
from tinyexperts.study.analysis.isoflop_tables import isoflop_tables
from tinyexperts.study.analysis.report import template_environment
from tinyexperts.study.analysis.run_tables import commands_table, runs_table
from tinyexperts.study.analysis.study_figures import (
    ablation_curves,
    difference_trend,
    isoflop_curves,
    losses_by_time,
    residuals,
    unevenness_curves,
)
from tinyexperts.study.analysis.study_points import read_points
from tinyexperts.study.runner.study_folder import StudyFolder


def write_study_report(folder: StudyFolder, *, command: str, created: datetime | None = None) -> Path:
    """Write report.html, report.md and tables/*.csv into the folder of a study; returns the page.

    Raises:
        InputError: no run of the study is done.
    """
    settings = folder.settings()
    found = read_points(folder)
    points, problems = found.done, found.problems
    problems += [
        f"stage {number} was planned when {' and '.join(stage.without)} had failed: it may have been planned otherwise."
        for number, stage in enumerate(folder.stages(), start=1)
        if stage.without
    ]
    if not points:
        raise InputError(f"no run of the study in {folder.path} is done: there is nothing to report")
    drawings: list[Drawing | None]
    analysis: IsoFlopAnalysis | AblationAnalysis
    if settings.study == "isoflop":
        analysis = IsoFlopAnalysis(points, found.to_come)
        counts = ("active", "total", "matmul")
        problems += analysis.doubts()
        drawings = [difference_trend(analysis)]
        drawings += [isoflop_curves(analysis, budget, count) for budget in analysis.budgets for count in counts]
        drawings.append(losses_by_time(analysis))
        drawings.append(residuals(analysis))
    else:
        analysis = AblationAnalysis(settings.study, points, found.to_come)
        drawings = [ablation_curves(analysis), unevenness_curves(analysis)]
    rows = [group.first.run for group in analysis.groups]
    if isinstance(analysis, IsoFlopAnalysis):
        rows += [point.run for point in analysis.tuning]
    of_analysis = isoflop_tables(analysis) if isinstance(analysis, IsoFlopAnalysis) else analysis.tables()
    tables = [*of_analysis, runs_table(points), commands_table(rows, settings.evaluation_tokens)]
    claims = analysis.claims()
    seconds = sum(point.seconds for point in points)
    title = f"The study {settings.study} at {settings.scale} scale"
    page = (
        template_environment()
        .get_template("study_report.html.j2")
        .render(
            title=title,
            command=command,
            created=(created or datetime.now().astimezone()).isoformat(sep=" ", timespec="minutes"),
            settings=settings,
            num_runs=len(points),
            hours=seconds / 3600,
            claims=claims,
            problems=problems,
            drawings=[drawing for drawing in drawings if drawing is not None],
            tables=[table for table in tables if table.rows],
            versions=sorted({_versions(point.result.run["versions"]) for point in points if point.result.run}),
        )
    )
    path = folder.path / "report.html"
    write_atomically(path, page)
    (folder.path / "tables").mkdir(exist_ok=True)
    for table in tables:
        (folder.path / "tables" / f"{table.name}.csv").write_text(table.as_csv(), encoding="utf-8")
    verdicts = [f"- {claim.claim}: **{claim.verdict}** ({claim.evidence})" for claim in claims]
    doubts = ["What is missing or doubtful:", "", *(f"- {problem}" for problem in problems), ""] if problems else []
    text = [f"# {title}", "", *verdicts, "", *doubts, *(table.as_markdown() for table in tables if table.rows)]
    (folder.path / "report.md").write_text("\n".join(text), encoding="utf-8")
    return path


def _versions(of_run: Mapping[str, str]) -> str:
    """Of the packages and of Python; machines differ within a study, and their seconds stand in the tables."""
    return ", ".join(f"{name} {version}" for name, version in of_run.items() if name != "platform")
