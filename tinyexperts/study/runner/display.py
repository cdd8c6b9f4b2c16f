"""The progress of many runs: one bar for all, and one for each that is under way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from tinyexperts.training.last_metrics import last_metrics

MAX_BARS = 8  # of more runs than this only those under way have a bar, below the one for all

_NOTHING: dict[str, Any] = {"stage": "", "loss": "", "speed": "", "remaining": ""}


class Display:
    """The bars of runs, each known by its folder, its progress read from its metrics."""

    def __init__(self, progress: Progress, folders: Sequence[Path], title: str, num_done: int) -> None:
        self._progress = progress
        self._is_short = len(folders) <= MAX_BARS
        self._num_failed = 0
        total = num_done + len(folders)
        is_alone = self._is_short and not num_done
        self._overall = progress.add_task(
            f"{title}{total} runs", total=total, completed=num_done, visible=not is_alone, **_NOTHING
        )
        waiting = _NOTHING | {"stage": "waiting"}
        self._tasks = {
            folder: progress.add_task(folder.name, total=None, start=False, visible=self._is_short, **waiting)
            for folder in folders
        }

    def begin(self, folder: Path, stage: str) -> None:
        """Show a run as under way.

        Args:
            folder (Path): the folder of the run.
            stage (str): its work in a word.
        """
        task = self._tasks[folder]
        self._progress.start_task(task)
        self._progress.update(task, stage=stage, visible=True)

    def refresh(self, folder: Path) -> None:
        """Show the progress of a run by now."""
        last = last_metrics(folder / "metrics.jsonl")
        train = last.get("train")
        if train is None:
            return
        try:
            num_steps = json.loads((folder / "run.json").read_text(encoding="utf-8"))["num_steps"]
        except (FileNotFoundError, ValueError, KeyError):
            return
        step = train["step"]
        remaining = train["seconds"] * (num_steps - step) / step if step else 0.0
        held_out = f", held out {last['validation']['loss']:.3f}" if "validation" in last else ""
        self._progress.update(
            self._tasks[folder],
            total=num_steps,
            completed=step,
            loss=f"loss {train['loss']:.3f}{held_out}",
            speed=f"{train['tokens_per_second']:,.0f} tokens/s",
            remaining=f"{int(remaining) // 60}:{int(remaining) % 60:02d} left",
        )

    def save(self, folder: Path) -> None:
        """Show that a run was asked to save and stop."""
        self._progress.update(self._tasks[folder], stage="saving", remaining="")

    def end(self, folder: Path, *, is_failed: bool) -> None:
        """Show that a run has ended."""
        word = "[red]failed[/red]" if is_failed else "[green]done[/green]"
        self._progress.update(self._tasks[folder], stage=word, remaining="", visible=self._is_short)
        self._num_failed += is_failed
        failed = f"[red]{self._num_failed} failed[/red]" if self._num_failed else ""
        self._progress.update(self._overall, advance=1, loss=failed)


@contextmanager
def display_of(folders: Sequence[Path], *, console: Console, title: str = "", num_done: int = 0) -> Iterator[Display]:
    """Show the progress of runs.

    Args:
        folders (Sequence[Path]): the folders of the runs that are to be done.
        console (Console): the place of the display.
        title (str): the first words of the bar of all runs.
        num_done (int): runs that were done before, for the bar of all runs.
    """
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[stage]}", table_column=Column(no_wrap=True, min_width=8)),
        BarColumn(bar_width=None),
        TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[remaining]}"),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Display(progress, folders, title, num_done)
