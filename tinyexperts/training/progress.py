"""The display of a run: one bar with the loss, the speed and the time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingBar:
    """A rich progress bar on standard error; off, it does nothing."""

    def __init__(self, name: str, *, num_steps: int, first_step: int, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            expand=True,
            disable=not enabled,
        )
        self._note = ""
        self._task = self._progress.add_task(name, total=num_steps, completed=first_step, numbers="")

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float, flops_per_second: float) -> None:
        """Show that `step` steps are made, with the last numbers."""
        numbers = (
            f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {flops_per_second / 1e9:.1f} GFLOP/s{self._note}"
        )
        self._progress.update(self._task, completed=step, numbers=numbers)

    def note(self, text: str) -> None:
        """Show a text with the numbers from the next update on."""
        self._note = text and f"  {text}"

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._progress.disable:
            self._progress.console.print(text, markup=False, highlight=False)
