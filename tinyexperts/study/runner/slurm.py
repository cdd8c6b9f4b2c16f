"""The runs of a study as a Slurm job array, by submitit (pip install 'tinyexperts[slurm]')."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from tinyexperts.errors import InputError
from tinyexperts.study.grid import GridRun
from tinyexperts.study.runner.display import display_of
from tinyexperts.study.runner.local_queue import signals_as_interrupts
from tinyexperts.study.runner.planned_run import finish_run
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.training import Interrupted

_POLL_SECONDS = 5.0


def run_array(
    folder: StudyFolder,
    runs: Sequence[GridRun],
    *,
    num_parallel: int,
    console: Console,
    title: str = "",
    num_done: int = 0,
    cluster: str = "slurm",
    **parameters: Any,
) -> None:
    """Submit the runs and wait for them; the folder keeps the failures. Whatever ends the wait cancels the rest.

    Args:
        folder (StudyFolder): the study.
        runs (Sequence[GridRun]): the runs to submit.
        num_parallel (int): jobs at a time.
        console (Console): the place of the display.
        title (str): for the display, as in run_jobs.
        num_done (int): for the display, as in run_jobs.
        cluster (str): the name of submitit's executor.
        parameters (Any): settings of the executor (timeout_min, slurm_partition, ...).

    Raises:
        InputError: submitit is not installed, or there is no Slurm.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("--executor slurm wants submitit: pip install 'tinyexperts[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=folder.path / "logs" / "submitit", cluster=cluster)
    except RuntimeError as error:
        raise InputError(f"--executor slurm wants a machine of a Slurm cluster: {error}") from None
    executor.update_parameters(name=folder.settings().study, slurm_array_parallelism=num_parallel, **parameters)
    jobs: dict[str, Any] = {}
    with signals_as_interrupts():
        try:
            with executor.batch():
                jobs = {run.name: executor.submit(_Work(), folder.path, run.name) for run in runs}
            _wait(folder, jobs, console, title, num_done)
        except BaseException:
            for job in jobs.values():
                with suppress(Exception):  # one that was not submitted yet, or that can't be reached
                    job.cancel(check=False)
            raise


class _Work:
    """The work of a job. When its time is over the run is saved, and the job queued again (submitit: three times)."""

    def __call__(self, folder: Path, name: str) -> None:
        try:
            finish_run(folder, name)
        except Interrupted as stop:
            if stop.signal == signal.SIGUSR2:
                signal.raise_signal(stop.signal)  # the training had it for itself; now submitit queues the job again
            raise

    def checkpoint(self, folder: Path, name: str) -> Any:
        """Return what submitit is to call when the job is queued again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder, name)


def _wait(folder: StudyFolder, jobs: dict[str, Any], console: Console, title: str, num_done: int) -> None:
    """Wait until all jobs have ended; those that have are taken out."""
    folders = [folder.run_path(name) for name in jobs]
    with display_of(folders, console=console, title=title, num_done=num_done) as display:
        while jobs:
            for name, job in list(jobs.items()):
                path = folder.run_path(name)
                if job.done():
                    del jobs[name]
                    error = job.exception()
                    if error is not None:
                        with suppress(OSError):  # a full disk, say, must not stop the others
                            folder.note_failure(name, f"{_raised(error)} (all it printed: {job.paths.stderr})")
                    display.refresh(path)
                    display.end(path, is_failed=error is not None)
                elif job.state == "RUNNING":
                    display.begin(path, "running")
                    display.refresh(path)
            if jobs:
                time.sleep(_POLL_SECONDS)


def _raised(error: Exception) -> str:
    """Return the sentence of a job's error, from a traceback or the state of a job without a result."""
    state = re.search(r"has not produced any output \(state: ([^)]+)\)", str(error))
    if state:
        return f"its job ended without a result, in the state {state[1]}"
    raised = re.findall(r"^[\w.]*(?:Error|Exception|Interrupted|Diverged): (.*)$", str(error), re.MULTILINE)
    return raised[-1] if raised else f"{type(error).__name__}: {error}".splitlines()[0]
