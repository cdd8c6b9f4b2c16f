"""What the ranks of test_faults.py do: train, and fail at it."""

from __future__ import annotations

import os
import resource
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment

from tinyexperts.errors import InputError
from tinyexperts.training import TrainConfig, checkpoint_files, train
from tinyexperts.training.checkpoint import CheckpointWriter
from tinyexperts.training.ranks import joined


def be_refused(
    rank: int,
    num_ranks: int,
    port: int,
    configs: list[TrainConfig],
    message: str,
    resume: tuple[bool, ...],
    attempt: dict[str, str] | None = None,
) -> None:
    """Every rank gets the sentence; configurations and resumption are dealt out in turns."""
    os.environ |= environment(rank, num_ranks, port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (attempt or {}).items():
            patch.setenv(name, value)
        with pytest.raises((InputError, OSError), match=message):
            train(configs[rank % len(configs)], resume=resume[rank % len(resume)], progress=False)


def start_again(rank: int, num_ranks: int, port: int, config: TrainConfig, attempt: dict[str, str]) -> None:
    """As torchrun does when a rank has died: by the same command."""
    os.environ |= environment(rank, num_ranks, port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in attempt.items():
            patch.setenv(name, value)
        train(config, progress=False)


def see_time_outs(rank: int, num_ranks: int, port: int, config: TrainConfig) -> None:
    """Of all groups, and of that which writes checkpoints beside the training."""
    os.environ |= environment(rank, num_ranks, port)
    with joined(config) as ranks:
        writer = CheckpointWriter(config.run, keep=1, ranks=ranks, asynchronous=True)
        groups = [ranks.groups.tokens, ranks.groups.columns, ranks.groups.replicas, writer._ranks.groups.tokens]
        assert [group.size() for group in groups] == [4, 2, 2, 4]
        time_outs = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert time_outs == [timedelta(seconds=config.timeout_seconds)] * 4


def die_while_writing(rank: int, num_ranks: int, port: int, config: TrainConfig, step: int) -> None:
    """The last rank is gone when it has written its part of the checkpoint of a step, but not said so."""
    os.environ |= environment(rank, num_ranks, port)
    write = checkpoint_files._write_small

    def write_and_die(tensors: Any, folder: Path, ranks: Any) -> None:
        write(tensors, folder, ranks)
        if rank == num_ranks - 1 and folder.name.startswith(f"step-{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_files._write_small = write_and_die
    train(config, progress=False)


def have_no_room(rank: int, num_ranks: int, port: int, config: TrainConfig, file_bytes: int) -> None:
    """A file-size limit on the last rank is the nearest thing to a full disk that a test can have without being root.

    With a small `file_bytes` it is a table's part that does not fit.
    """
    os.environ |= environment(rank, num_ranks, port)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = rf"step 4 could not be written \(File too large on rank {num_ranks - 1}\); the last good .*step-00000002"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files, "FILE_BYTES", file_bytes)
        if rank == num_ranks - 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
        try:
            with pytest.raises(InputError, match=told):
                train(config, resume=True, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
