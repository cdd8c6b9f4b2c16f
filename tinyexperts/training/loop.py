"""The training loop: one run from its configuration to its last checkpoint.

Everything that the next step depends on is in the checkpoint, and batches are a pure function of (seed, step), so that
a resumed run continues bit for bit.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch.optim import Optimizer

from tinyexperts.data import TokenSplit
from tinyexperts.errors import EarlyExit, InputError
from tinyexperts.evaluation import measure_facts, measure_perplexity
from tinyexperts.layers import PEERConfig, ProductKeyMemoryConfig
from tinyexperts.ops.kernels_on import kernels_on
from tinyexperts.optim import cosine, scale_learning_rates, warmup_stable_decay
from tinyexperts.training import run_folder
from tinyexperts.training.checkpoint import (
    CheckpointWriter,
    checkpoints,
    is_finite,
    last_good_checkpoint,
    load_checkpoint,
)
from tinyexperts.training.compilation import without_compilation
from tinyexperts.training.config import ScheduleConfig, TrainConfig
from tinyexperts.training.device import autocast
from tinyexperts.training.distributed.launch import init_distributed
from tinyexperts.training.distributed.sharding import reshard_after_eval
from tinyexperts.training.progress import TrainingBar
from tinyexperts.training.run import Run, make_run
from tinyexperts.training.run_start import agree_on_resume, check_same_data, claim_folder, resume_command
from tinyexperts.training.step import optimizer_step

# Kinds of parameters -> the names of their learning rates in metrics, as in OptimizerConfig.
_KINDS = {"matrices": "matrix", "embedding": "embedding", "head": "head", "tables": "table", "vectors": "vector"}


class Interrupted(EarlyExit):
    """The end of a run that was saved and stopped; the message has the command that resumes it."""

    exit_code = 130

    def __init__(self, message: str, *, signal: int | None = None) -> None:
        """Keep the reason.

        Args:
            message (str): the sentence.
            signal (int | None): the request to stop: SIGINT (Ctrl-C), SIGTERM, SIGHUP, or SIGUSR2, which submitit sends
                when a job's time is over; None for a study that was stopped.
        """
        super().__init__(message)
        self.signal = signal


def train(
    config: TrainConfig, *, resume: bool = False, progress: bool = True, command: Sequence[str] | None = None
) -> None:
    """Train a model to the end of its configuration, in its run folder.

    Under torchrun all ranks call it and train one model together; the first rank writes the run folder. Signals stop a
    run in the main thread only, as Python hands them to no other.

    Args:
        config (TrainConfig): the configuration.
        resume (bool): continue from the last checkpoint of the run folder.
        progress (bool): show a progress bar.
        command (Sequence[str] | None): the arguments of `tinyexperts`, which run.json keeps and the command to resume
            repeats; None from Python.

    Raises:
        InputError: bad input, a loss that is not finite, or a disk that is full.
        Interrupted: after Ctrl-C, SIGTERM, SIGHUP or SIGUSR2, when the run is saved.
        LostRank: a rank did not answer.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(init_distributed(config))
        resume = agree_on_resume(resume, config, ranks)
        with ranks.raise_on_all_ranks():
            run = make_run(config, ranks)
        check_same_data(run)
        state: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": []}
        with ranks.raise_on_all_ranks():
            claim_folder(run, resume, stack, state, command)
        # None where the run was cut off before its first; the first rank's, since a folder may lag elsewhere.
        if resume and (found := ranks.all_gather_object(checkpoints(config.run))[0]):
            state = load_checkpoint(found[-1], run.model, run.optimizers, ranks=ranks)
        if state["step"] >= run.num_steps or state.get("ended"):
            if ranks.is_first:
                print(f"{config.run} is finished: it has made all its {state['step']:,} steps", file=sys.stderr)
            return
        bar = stack.enter_context(
            TrainingBar(
                config.run.name,
                num_steps=run.num_steps,
                first_step=state["step"],
                enabled=progress and ranks.is_first,
            )
        )
        metrics = None
        with ranks.raise_on_all_ranks():
            if ranks.is_first:
                metrics = run_folder.Metrics(config.run, after_step=state["step"])
                stack.callback(metrics.close)
        stop = stack.enter_context(_stop_signal())
        bar.say(
            f"{config.run}: {run.num_steps:,} steps on {_place(run)} in {run.precision}, {run.compilation_choice}; "
            f"{_tables(run)}"
        )
        _steps(run, state, metrics, bar, stop, command)


def _place(run: Run) -> str:
    """Return the place of the computation, in words."""
    if run.ranks.mesh is None:
        return str(run.device)
    return f"{run.ranks.size} ranks ({' x '.join(map(str, run.ranks.mesh.shape))}) on {run.device.type}"


def _tables(run: Run) -> str:
    """Return the code that runs the tables and what becomes of their gradients, in words."""
    if not isinstance(run.config.model.expert_layer, PEERConfig | ProductKeyMemoryConfig):
        return run.table_choice
    return f"{kernels_on(run.device)}; {run.table_choice}"


def _steps(
    run: Run,
    state: dict[str, Any],
    metrics: run_folder.Metrics | None,
    bar: TrainingBar,
    stop: Callable[[], int],
    command: Sequence[str] | None,
) -> None:
    """Make the steps; what `state` says was done is not done again."""
    config = run.config
    with CheckpointWriter(
        config.run, keep=config.checkpoint.keep, ranks=run.ranks, asynchronous=config.checkpoint.asynchronous
    ) as writer:
        if run.teaching is not None and not state["step"]:  # what was known before
            _record(run, metrics, "validation", 0, **_validate(run), num_tokens=0, training_flops=0, seconds=0.0)
        while state["step"] < run.num_steps and not state.get("ended"):
            started = time.perf_counter()
            scale_learning_rates(run.optimizers, _schedule(config.schedule, state["step"], run.num_steps))
            loss, gradient_norm = optimizer_step(run, state["step"])
            seconds = time.perf_counter() - started
            state["step"] += 1
            state["seconds"] += seconds
            state["losses"].append(loss)
            step, is_last = state["step"], state["step"] == run.num_steps
            done = {"num_tokens": step * config.tokens_per_step, "training_flops": step * run.flops_per_step}
            if step % config.log_every == 0 or is_last:
                mean_loss = math.fsum(state["losses"]) / len(state["losses"])
                state["losses"] = []
                speed = {
                    "tokens_per_second": config.tokens_per_step / seconds,
                    "flops_per_second": run.flops_per_step / seconds,
                }
                numbers = {"gradient_norm": gradient_norm, "seconds": state["seconds"]}
                numbers |= _learning_rates(run.optimizers)
                _record(run, metrics, "train", step, loss=mean_loss, **done, **numbers, **speed)
                bar.update(step, loss=mean_loss, **speed)
            if step % config.validation_every == 0 or is_last:
                with without_compilation() if run.is_compiled else nullcontext():
                    found = _validate(run)
                _record(run, metrics, "validation", step, **found, **done, seconds=state["seconds"])
                bar.note(_in_words(run, found) if config.teaching else "")
                if config.teaching is not None:
                    is_last = state["ended"] = _has_learned(state, found, config.teaching.patience) or is_last
            stopped = int(max(run.ranks.all_gather_scalar(stop())))
            if stopped or step % config.checkpoint.every == 0 or is_last:
                _check_weights(run, step)
                writer.save(step, run.model, run.optimizers, state)
            if stopped and not is_last:
                writer.wait()
                name = signal.Signals(stopped).name
                how = resume_command(run.ranks, command)
                raise Interrupted(f"{name}: saved {config.run} at step {step}; to go on: {how}", signal=stopped)


def _record(run: Run, metrics: run_folder.Metrics | None, split: str, step: int, **values: float) -> None:
    """Write a measurement; all ranks raise if there is no room for it."""
    with run.ranks.raise_on_all_ranks():
        if metrics is not None:
            metrics.write(split, step, **values)


def _validate(run: Run) -> dict[str, float]:
    """Return the held-out loss and, of a data set of facts, the recall, both of about validation_tokens.

    A run that teaches is measured on what it is asked besides, too: `old_loss` and so on.
    """
    found = _measure(run, run.dataset.split("validation"))
    for name, split in run.asked.items():
        found |= {f"{name}_{measure}": value for measure, value in _measure(run, split).items()}
    reshard_after_eval(run.model)
    return found


def _measure(run: Run, split: TokenSplit) -> dict[str, float]:
    result = measure_perplexity(
        run.model,
        split,
        context_length=run.config.model.context_length,
        batch_size=run.config.batch_size,
        max_tokens=run.config.validation_tokens,
        forward_context=autocast(run.precision, run.device),
        ranks=None if run.ranks.groups is None else run.ranks.groups.all_ranks,
    )
    found = {"loss": result.loss}
    if split.facts is not None:
        facts = measure_facts(
            run.model,
            split,
            max_facts=math.ceil(run.config.validation_tokens * split.num_documents / split.num_tokens),
            forward_context=autocast(run.precision, run.device),
        )
        found |= {"recall": facts.all.recall, "nats_per_fact": facts.all.nats}
    return found


def _in_words(run: Run, found: Mapping[str, float]) -> str:
    """Return what a model that is taught knows of the new and of what else it is asked, for the bar."""
    prefixes = {"new": "", **{name: f"{name}_" for name in run.asked}}
    return ", ".join(
        f"{name} {100 * found[f'{prefix}recall']:.1f} %"
        if f"{prefix}recall" in found
        else f"{name} {found[f'{prefix}loss']:.2f} nats"
        for name, prefix in prefixes.items()
    )


def _has_learned(state: dict[str, Any], found: Mapping[str, float], patience: int) -> bool:
    """Note a validation, and return True if so many were no better than the best before them."""
    value = found.get("nats_per_fact", found["loss"])
    if value < state.get("best", math.inf):
        state["best"], state["num_worse"] = value, 0
    else:
        state["num_worse"] = state.get("num_worse", 0) + 1
    return bool(state["num_worse"] >= patience)


def _check_weights(run: Run, step: int) -> None:
    """Refuse a weight that is not finite: its checkpoint must not push out a good one."""
    with run.ranks.raise_on_all_ranks():
        for name, parameter in run.model.named_parameters():
            if not is_finite(parameter):
                last = last_good_checkpoint(run.config.run)
                raise InputError(f"step {step} left weights that are not finite in {name}; {last}")


def _learning_rates(optimizers: Sequence[Optimizer]) -> dict[str, float]:
    """Return the learning rate of each kind of parameter; that of vectors only where it is not the matrices'."""
    rates = {group["name"]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    if rates.get("vectors") == rates.get("matrices"):
        rates.pop("vectors", None)
    return {f"{_KINDS[name]}_learning_rate": rate for name, rate in rates.items()}


def _schedule(config: ScheduleConfig, step: int, num_steps: int) -> float:
    warmup_steps = round(config.warmup_fraction * num_steps)
    if config.shape == "cosine":
        return cosine(step, num_steps=num_steps, warmup_steps=warmup_steps)
    decay_steps = min(round(config.decay_fraction * num_steps), num_steps - warmup_steps)
    return warmup_stable_decay(step, num_steps=num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)


@contextmanager
def _stop_signal() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal that asked to stop, or 0; a second Ctrl-C stops at once.

    Only Python's main thread can listen to signals. A handler that is not Python's could not be restored, and stays.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
                if (handler := signal.getsignal(number)) is not None:
                    before[number] = handler
                    signal.signal(number, note)
        yield lambda: came[0] if came else 0
    finally:
        for listened, handler in before.items():
            signal.signal(listened, handler)
