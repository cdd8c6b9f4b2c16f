"""Runs side by side: each is a chain of commands in child processes, a few at a time, all in one progress display.

On Ctrl-C the children are asked to stop; they save, so that the same command continues later.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from rich.console import Console

from tinyexperts.study.runner.display import Display, display_of

POLL_SECONDS = 0.25
PROGRAM = (sys.executable, "-m", "tinyexperts")
# One core a run: each run's seconds are then its own, whatever else runs. On Linux huge pages, and memory that glibc
# keeps rather than gives back after each step, spare both methods page faults: 10 to 20 % of a step, measured.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # the largest that glibc takes
}
GRACE_SECONDS = 60.0  # for a checkpoint to be written after a request to stop


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a job."""

    name: str
    """Its work in a word, for the display."""
    arguments: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as a chain of commands."""

    folder: Path
    """The folder of the run."""
    commands: tuple[Command, ...]
    log: Path
    """The file that keeps what the commands print."""


@dataclass(kw_only=True)
class _Active:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    number: int
    log_start: int


@dataclass(kw_only=True)
class _Queue:
    """The jobs that wait, those that run, and the failures in a sentence each."""

    waiting: list[Job]
    environment: Mapping[str, str]
    display: Display
    failed: Callable[[str, str], None]
    active: list[_Active] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def start(self, job: Job, number: int) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
        log_start = log.tell()
        # A session of its own: the terminal's Ctrl-C would otherwise reach the child too, which then gets it twice.
        process = subprocess.Popen(
            job.commands[number].arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        self.display.begin(job.folder, job.commands[number].name)
        self.active.append(_Active(job=job, process=process, log=log, number=number, log_start=log_start))

    def advance(self) -> None:
        """Move every run whose command has ended to its next one, or out."""
        for run in list(self.active):
            status = run.process.poll()
            self.display.refresh(run.job.folder)
            if status is None:
                continue
            run.log.close()
            self.active.remove(run)
            if status == 0 and run.number + 1 < len(run.job.commands):
                self.start(run.job, run.number + 1)
                continue
            if status != 0:
                self.failures[run.job.folder.name] = _failure(run, status)
                with suppress(OSError):  # a full disk, say, must not stop the others; the failure is returned anyway
                    self.failed(run.job.folder.name, self.failures[run.job.folder.name])
            self.display.end(run.job.folder, is_failed=status != 0)

    def stop(self) -> None:
        """Ask the children to save and end; end those that don't, or all at once on a second Ctrl-C."""
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for run in self.active:
                self.display.save(run.job.folder)
                run.process.send_signal(signal.SIGINT)
            for run in self.active:
                run.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for run in self.active:
                run.process.kill()
                run.process.wait()
        for run in self.active:
            run.log.close()


def run_jobs(
    jobs: Sequence[Job],
    *,
    num_parallel: int,
    environment: Mapping[str, str],
    console: Console,
    max_seconds: float = math.inf,
    title: str = "",
    num_done: int = 0,
    failed: Callable[[str, str], None] = lambda name, sentence: None,
) -> dict[str, str]:
    """Run jobs in child processes, in their order; a failed job doesn't stop the others.

    Args:
        jobs (Sequence[Job]): the jobs.
        num_parallel (int): jobs at a time.
        environment (Mapping[str, str]): environment variables of the children, in addition to those of this process.
        console (Console): the place of the display.
        max_seconds (float): the time after which the children are asked to save and end.
        title (str): for the display.
        num_done (int): jobs that had ended before, for the display.
        failed (Callable[[str, str], None]): called with the run's name and one sentence when a job fails.

    Returns:
        The failures: one sentence by the run's name.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM or a closed terminal, after the children were asked to save and end.
    """
    deadline = time.monotonic() + max_seconds
    folders = [job.folder for job in jobs]
    with display_of(folders, console=console, title=title, num_done=num_done) as display, signals_as_interrupts():
        queue = _Queue(waiting=list(jobs), environment=environment, display=display, failed=failed)
        try:
            while queue.waiting or queue.active:
                while queue.waiting and len(queue.active) < num_parallel:
                    queue.start(queue.waiting.pop(0), 0)
                time.sleep(POLL_SECONDS)
                queue.advance()
                if time.monotonic() > deadline:
                    queue.stop()
                    break
        except BaseException:
            queue.stop()
            raise
    return queue.failures


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Handle SIGTERM and a closed terminal as Ctrl-C, so that no child outlives its parent."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(run: _Active, status: int) -> str:
    """Return the failure in a sentence, with the last line that the command printed."""
    name = run.job.commands[run.number].name
    with run.job.log.open("rb") as file:
        file.seek(run.log_start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    reason = lines[-1].removeprefix("tinyexperts: ") if lines else "it printed nothing"
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    return f"{name} of {run.job.folder.name} failed with {how}: {reason} (all it printed: {run.job.log})"
