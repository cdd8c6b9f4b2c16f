"""The training loop: one run from its configuration to its last checkpoint.

Everything that the next step depends on is in the checkpoint, and batches are a pure function of (seed, step), so that
a resumed run continues bit for bit.
"""

from __future__ import annotations

import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

import tinyexperts
from tinyexperts.data import TokenDataset, TokenLoader
from tinyexperts.errors import InputError
from tinyexperts.evaluation import measure_perplexity
from tinyexperts.layers import ProductKeyLayer
from tinyexperts.model import Transformer
from tinyexperts.optim import (
    build_optimizers,
    clip_gradient_norm_,
    cosine,
    expected_touched_share,
    scale_learning_rates,
    warmup_stable_decay,
)
from tinyexperts.training import run_folder
from tinyexperts.training.checkpoint import checkpoints, is_finite, load_checkpoint, save_checkpoint
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.device import autocast, choose_device, choose_precision, out_of_memory_told
from tinyexperts.training.progress import TrainingBar

# On devices without a fused step of their own: sparse table gradients where a step is expected to touch a smaller share
# of the rows; above it the dense gradient with a fused AdamW wins. On the CPU the fused step wins at any share.
SPARSE_BELOW_SHARE = 0.25


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run was saved; the message says how to resume it."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run is made of; only the weights and the optimisers' states change."""

    config: TrainConfig
    dataset: TokenDataset
    loader: TokenLoader
    model: Transformer
    optimizers: list[Optimizer]
    device: torch.device
    precision: str
    num_steps: int
    flops_per_step: int
    table_choice: str


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> None:
    """Run a configuration to its end, in its run folder; `resume` goes on from the last checkpoint.

    Raises:
        InputError: bad input, a loss that is not finite, or a disk that is full.
        Interrupted: after Ctrl-C or SIGTERM, when the run is saved.
    """
    run = _prepare(config)
    if resume:
        run_folder.check_unchanged(config)
    else:
        run_folder.check_free(config.run)
    with run_folder.held(config.run):
        state: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": []}
        if resume:
            run_folder.check_data(config.run, run.dataset)
            if found := checkpoints(config.run):  # none where the run was cut off before its first
                state = load_checkpoint(found[-1], run.model, run.optimizers)
        else:
            run_folder.create(config, run.dataset.tokenizer, _describe(run))
        if state["step"] >= run.num_steps:
            print(f"{config.run} is finished: it has made all its {run.num_steps:,} steps", file=sys.stderr)
            return
        bar = TrainingBar(config.run.name, num_steps=run.num_steps, first_step=state["step"], enabled=progress)
        with closing(run_folder.Metrics(config.run, after_step=state["step"])) as metrics, bar, _stop_signal() as stop:
            bar.say(f"{config.run}: {run.num_steps:,} steps on {run.device} in {run.precision}; {run.table_choice}")
            _steps(run, state, metrics, bar, stop)


def _prepare(config: TrainConfig) -> _Run:
    """Open the data and make the model as it is before its first step; nothing is written."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = TokenDataset.open(config.data)
    if dataset.index.vocab_size != config.model.vocab_size:
        raise InputError(
            f"model.vocab_size must be that of {config.data}, {dataset.index.vocab_size} "
            f"(--model.vocab-size {dataset.index.vocab_size}), got {config.model.vocab_size}"
        )
    loader = TokenLoader(
        dataset.split("train"),
        batch_size=config.batch_size * config.gradient_accumulation,
        context_length=config.model.context_length,
        seed=config.seed,
    )
    device = choose_device(config.device)
    sparse_tables, table_choice = _choose_table_gradients(config, device)
    torch.manual_seed(config.seed)
    with out_of_memory_told(device):
        model = Transformer(config.model, sparse_tables=sparse_tables).to(device)
    flops_per_step = 3 * model.flops_per_token(config.model.context_length) * config.tokens_per_step
    num_steps = config.num_steps or int((config.training_flops or 0) // flops_per_step)
    if num_steps < 1:
        raise InputError(
            f"training_flops must pay for one step at least, {flops_per_step:.3g}, got {config.training_flops}"
        )
    return _Run(
        config=config,
        dataset=dataset,
        loader=loader,
        model=model,
        optimizers=_optimizers(config, model, sparse_tables),
        device=device,
        precision=choose_precision(config.precision, device),
        num_steps=num_steps,
        flops_per_step=flops_per_step,
        table_choice=table_choice,
    )


def _steps(
    run: _Run, state: dict[str, Any], metrics: run_folder.Metrics, bar: TrainingBar, stop: Callable[[], str | None]
) -> None:
    """The loop: what `state` says was done is not done again."""
    config = run.config
    while state["step"] < run.num_steps:
        started = time.perf_counter()
        scale_learning_rates(run.optimizers, _schedule(config, state["step"], run.num_steps))
        loss, gradient_norm = _step(run, state["step"])
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
            learning_rate = run.optimizers[0].param_groups[0]["lr"]
            numbers = {"gradient_norm": gradient_norm, "learning_rate": learning_rate, "seconds": state["seconds"]}
            metrics.write("train", step, loss=mean_loss, **done, **numbers, **speed)
            bar.update(step, loss=mean_loss, **speed)
        if step % config.validation_every == 0 or is_last:
            metrics.write("validation", step, loss=_validation_loss(run), **done, seconds=state["seconds"])
        stopped = stop()
        if stopped or step % config.checkpoint_every == 0 or is_last:
            _check_weights(run, step)
            save_checkpoint(config.run, step, run.model, run.optimizers, state, keep=config.keep_checkpoints)
        if stopped and not is_last:
            raise Interrupted(f"{stopped}: saved {config.run} at step {step}; to go on: {_resume_command()}")


def _validation_loss(run: _Run) -> float:
    return measure_perplexity(
        run.model,
        run.dataset.split("validation"),
        context_length=run.config.model.context_length,
        batch_size=run.config.batch_size,
        max_tokens=run.config.validation_tokens,
        forward_context=autocast(run.precision, run.device),
    ).loss


def _check_weights(run: _Run, step: int) -> None:
    """A checkpoint that holds a weight that is not finite must not push out a good one."""
    for name, parameter in run.model.named_parameters():
        if not is_finite(parameter):
            raise InputError(f"step {step} left weights that are not finite in {name}; {_last_good_checkpoint(run)}")


def _last_good_checkpoint(run: _Run) -> str:
    found = checkpoints(run.config.run)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def _step(run: _Run, step: int) -> tuple[float, float]:
    """One optimiser step; returns the loss in nats a token and the gradient's norm before clipping.

    Raises:
        InputError: a loss or a gradient that is not finite, before any weight has changed.
    """
    config = run.config
    run.model.train()
    batch = run.loader.batch(step)
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses = []
    micro_batches = zip(batch.inputs.split(config.batch_size), batch.targets.split(config.batch_size), strict=True)
    for inputs, targets in micro_batches:
        with autocast(run.precision, run.device):
            loss = run.model.loss(inputs.to(run.device), targets.to(run.device))
        (loss / config.gradient_accumulation).backward()
        losses.append(loss.detach())
    mean_loss = torch.stack(losses).mean().item()
    gradient_norm = clip_gradient_norm_(run.model.parameters(), config.gradient_clip).item()
    if not (math.isfinite(mean_loss) and math.isfinite(gradient_norm)):
        raise InputError(
            f"step {step + 1} gave a loss of {mean_loss} and a gradient norm of {gradient_norm}, on the sequences "
            f"{batch.sequence_ids.tolist()} of {config.data}; {_last_good_checkpoint(run)}"
        )
    for optimizer in run.optimizers:
        optimizer.step()
    return mean_loss, gradient_norm


def _schedule(config: TrainConfig, step: int, num_steps: int) -> float:
    warmup_steps = round(config.warmup_fraction * num_steps)
    if config.schedule == "cosine":
        return cosine(step, num_steps=num_steps, warmup_steps=warmup_steps)
    decay_steps = min(round(config.decay_fraction * num_steps), num_steps - warmup_steps)
    return warmup_stable_decay(step, num_steps=num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)


def _choose_table_gradients(config: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Whether tables get sparse gradients, and a sentence that says why."""
    layer = config.model.sparse_layer.build(config.model.d_model, device="meta")
    if not isinstance(layer, ProductKeyLayer):
        return False, "no tables"
    share = expected_touched_share(config.tokens_per_step, layer.retrieved_per_token, len(layer.experts))
    sparse = config.table_gradients == "sparse"
    if config.table_gradients == "auto":
        sparse = device.type == "cpu" or share < SPARSE_BELOW_SHARE
    kind = "sparse (RowSparseAdam)" if sparse else "dense (AdamW)"
    return sparse, f"table gradients {kind}: a step touches up to {share:.0%} of {len(layer.experts):,} rows"


def _optimizers(config: TrainConfig, model: Transformer, sparse_tables: bool) -> list[Optimizer]:
    return build_optimizers(
        model,
        sparse_tables=sparse_tables,
        matrix_lr=config.matrix_learning_rate,
        embedding_lr=config.embedding_learning_rate,
        head_lr=config.head_learning_rate,
        vector_lr=config.matrix_learning_rate,
        table_lr=config.table_learning_rate,
        betas=config.betas,
        table_betas=config.table_betas,
        weight_decay=config.weight_decay,
        table_second_moment=config.table_second_moment,
    )


def _describe(run: _Run) -> dict[str, Any]:
    model, count = run.model, run.model.num_parameters()
    return {
        "command": shlex.join(["tinyexperts", *sys.argv[1:]]),
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
        "tokens_per_step": run.config.tokens_per_step,
        "num_steps": run.num_steps,
    }


@contextmanager
def _stop_signal() -> Iterator[Callable[[], str | None]]:
    """Yield a function that says which of Ctrl-C and SIGTERM has come, if any; a second Ctrl-C stops at once."""
    came: list[str] = []

    def note(number: int, frame: object) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _resume_command() -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["tinyexperts", *arguments, "--resume"])
