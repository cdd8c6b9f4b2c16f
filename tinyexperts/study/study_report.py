"""The report of a study: a page, and its tables as CSV and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically
from tinyexperts.report.page import Finding, Page, Section
from tinyexperts.study.analysis.frame import StudyRuns, read_runs
from tinyexperts.study.analysis.tables import commands_table, runs_table
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings
from tinyexperts.study.study import Study

_NO_CLAIM = Finding(text="The paper claims nothing that this study could contradict.")


def write_study_report(study: Study, folder: StudyFolder, *, command: str) -> Path:
    """Write report.html, report.md and tables/*.csv into the folder of a study.

    Args:
        study (Study): the study.
        folder (StudyFolder): its folder.
        command (str): the command that makes the report again.

    Returns:
        The path of the page.

    Raises:
        InputError: no run of the study is done.
    """
    runs = read_runs(folder)
    if not runs.results:
        raise InputError(f"no run of the study in {folder.path} is done: there is nothing to report")
    page = _page(study, folder, runs, command)
    path = folder.path / "report.html"
    write_atomically(path, page.as_html())
    (folder.path / "tables").mkdir(exist_ok=True)
    for table in page.tables:
        (folder.path / "tables" / f"{table.name}.csv").write_text(table.as_csv(), encoding="utf-8")
    (folder.path / "report.md").write_text(page.as_markdown(), encoding="utf-8")
    return path


def _page(study: Study, folder: StudyFolder, runs: StudyRuns, command: str) -> Page:
    settings, found = runs.settings, study.findings(runs)
    planned_without = [
        f"stage {number} was planned when {' and '.join(stage.without)} had failed: it may have been planned otherwise."
        for number, stage in enumerate(folder.stages(), start=1)
        if stage.without
    ]
    shared = [
        runs_table(runs.done),
        commands_table([runs.planned[name] for name in found.repeatable], settings.evaluation_tokens),
    ]
    hours = runs.done.seconds.sum() / 3600
    versions = sorted({_versions(results.run["versions"]) for results in runs.results.values() if results.run})
    found = replace(
        found,
        title=found.title or f"The study {settings.study} at {settings.scale} scale",
        findings=found.findings or [_NO_CLAIM],
        doubts=[*runs.problems, *planned_without, *found.doubts],
        sections=[*found.sections, *(Section(title=table.title, tables=(table,)) for table in shared)],
    )
    subtitle = f"{study.question} {len(runs.results)} runs, {hours:.1f} hours of training"
    return Page(found=found, subtitle=subtitle, command=command, made_of=f"{_texts(settings)}. {'; '.join(versions)}")


def _texts(settings: StudySettings) -> str:
    corpora = f"; evaluated also on {', '.join(settings.evaluation_corpora)}" if settings.evaluation_corpora else ""
    tokens = f", {settings.evaluation_tokens:,} tokens of each text" if settings.evaluation_tokens else ""
    return f"Data {', '.join((settings.data, *settings.more_data))}{corpora}{tokens}"


def _versions(of_run: Mapping[str, str]) -> str:
    """Return the versions of packages and Python; machines differ within a study, and their seconds are in tables."""
    return ", ".join(f"{name} {version}" for name, version in of_run.items() if name != "platform")
