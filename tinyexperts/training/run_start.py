"""The start of a run in its folder, or its resumption: by all ranks with the same data, or by none."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import tinyexperts
from tinyexperts.errors import InputError
from tinyexperts.training import run_folder
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.distributed.ranks import Ranks
from tinyexperts.training.run import Run


def agree_on_resume(resume: bool, config: TrainConfig, ranks: Ranks) -> bool:
    """Return True to resume from a checkpoint: as asked, or if torchrun has started the ranks of a run again.

    Args:
        resume (bool): True if this rank was asked to.
        config (TrainConfig): the configuration.
        ranks (Ranks): the processes of the run.

    Raises:
        InputError: some ranks were asked to, others not.
    """
    requests = ranks.all_gather_object((resume, run_folder.is_run(config.run)))
    if len({asked for asked, _ in requests}) > 1:
        with_it = ", ".join(str(rank) for rank, (asked, _) in enumerate(requests) if asked)
        raise InputError(f"all ranks must be started with --resume, or none; got it on {with_it} of {ranks.size} alone")
    return resume or (ranks.restarted and requests[0][1])


def check_same_data(run: Run) -> None:
    """Check that all ranks have the same data set, which each may read from another disk.

    Raises:
        InputError: they are not the same.
    """
    digests = run.ranks.all_gather_object(run.dataset.sha256[:12])
    if len(set(digests)) > 1:
        raise InputError(f"all ranks must have the same data in {run.config.data}, got sha256 {', '.join(digests)}")


def claim_folder(
    run: Run, resume: bool, stack: ExitStack, state: dict[str, Any], command: Sequence[str] | None
) -> None:
    """Make the run's folder, or check that it is this run's; the first rank then holds it until the stack closes.

    A failure before the first step deletes a new folder again, so that the next try can have its name.

    Args:
        run (Run): the run.
        resume (bool): True to resume.
        stack (ExitStack): the end of the claim.
        state (dict[str, Any]): the trainer's state, which has the number of steps as "step".
        command (Sequence[str] | None): the arguments of `tinyexperts`; None from Python.

    Raises:
        InputError: the folder exists, is missing, belongs to other settings or data, or is in use.
    """
    folder = run.config.run
    if not run.ranks.is_first:
        return
    if resume:
        run_folder.check_unchanged(run.config)
    else:
        run_folder.check_free(folder)
    is_new = not folder.exists()
    stack.enter_context(run_folder.lock(folder))
    if resume:
        run_folder.check_data(folder, run.dataset, None if run.teaching is None else run.teaching.digest)
    run.ranks.note_begun()  # a death from here on leaves a folder of ours
    if not resume:
        run_folder.check_free(folder)  # again: what another process has begun meanwhile is not ours to forget
        stack.enter_context(_forgotten_unless_begun(folder, state, is_new=is_new))
        run_folder.create(run.config, run.dataset.tokenizer, _describe(run, command))


@contextmanager
def _forgotten_unless_begun(folder: Path, state: dict[str, Any], *, is_new: bool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if state["step"] == 0:
            run_folder.forget(folder, with_folder=is_new)
        raise


def _describe(run: Run, command: Sequence[str] | None) -> dict[str, Any]:
    model, count = run.model, run.model.num_parameters()
    return {
        "command": "train(config), from Python" if command is None else _command(run.ranks, command),
        "num_ranks": run.ranks.size,
        "versions": {
            "tinyexperts": tinyexperts.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "num_parameters": {"active": count.active, "total": count.total},
        "training_flops_per_token": {
            "router": 3 * model.router_flops_per_token(),
            "total": 3 * model.flops_per_token(run.config.model.context_length),
        },
        "data_sha256": run.dataset.sha256,
        **(
            {}
            if run.teaching is None
            else {"base_sha256": run.teaching.base_digest, "teaching_sha256": run.teaching.digest}
        ),
        "tokens_per_step": run.config.tokens_per_step,
        "num_steps": run.num_steps,
    }


def resume_command(ranks: Ranks, command: Sequence[str] | None) -> str:
    """Return the command that resumes a run.

    Args:
        ranks (Ranks): the processes of the run.
        command (Sequence[str] | None): the arguments of `tinyexperts` that began it; None from Python.
    """
    if command is None:
        return "train(config, resume=True)" + ("" if ranks.size == 1 else f" on each of {ranks.size} ranks")
    if command[0] != "train":  # a study resumes its runs without an option
        return _command(ranks, command)
    return _command(ranks, [*(argument for argument in command if argument != "--resume"), "--resume"])


def _command(ranks: Ranks, arguments: Sequence[str]) -> str:
    """Return the command that starts the run; the reader adds how several nodes find each other.

    Without the two dashes torchrun would take --run for the beginning of an option of its own.
    """
    if ranks.size == 1:
        return shlex.join(["tinyexperts", *arguments])
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    nodes = [] if of_node == ranks.size else ["--nnodes", str(ranks.size // of_node)]
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    again = [] if restarts == "0" else ["--max-restarts", restarts]
    launcher = ["torchrun", *nodes, "--nproc-per-node", str(of_node), *again]
    return shlex.join([*launcher, "-m", "--", "tinyexperts", *arguments])
