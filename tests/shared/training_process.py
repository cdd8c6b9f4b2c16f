"""A process that trains, which tests send signals."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

import torch
from forkserver import CONTEXT

from tinyexperts.training import Interrupted, TrainConfig, train


class TrainingProcess:
    """A process with the methods of subprocess.Popen that are used; its stderr is the reason why it stopped."""

    def __init__(self, config: TrainConfig) -> None:
        self._said, theirs = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=_train, args=(config, theirs))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        self._process.join(timeout)
        try:
            return None, self._said.recv() if self._said.poll() else ""
        except EOFError:
            return None, ""


def _train(config: TrainConfig, said: Connection) -> None:
    torch.set_num_threads(1)
    try:
        train(config, progress=False)
    except Interrupted as stop:
        said.send(str(stop))
        sys.exit(130)
