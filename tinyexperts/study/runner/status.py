"""The state of a study: the runs that are done, running, waiting or failed, and why."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from tinyexperts.study.runner.study_record import StudyRecord


def print_status(folder: StudyRecord) -> None:
    """Print a line for the whole, and one for each run that is neither done nor waiting."""
    settings, statuses = folder.settings(), [folder.status_of(name) for name in folder.planned_names()]
    counts = Counter(status.state for status in statuses)
    console = Console()
    console.print(
        f"{settings.study} at {settings.scale} scale in {folder.path}: {len(statuses)} runs planned so far, "
        + ", ".join(f"{counts[state]} {state}" for state in ("done", "running", "begun", "waiting", "failed")),
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("run", "state", "steps done", "reason"):
        table.add_column(column, justify="right" if column == "steps done" else "left", overflow="fold")
    for status in statuses:
        if status.state in ("running", "begun", "failed"):
            table.add_row(status.name, status.state, f"{status.progress:.0%}", status.reason or "")
    if table.row_count:
        console.print(table)
