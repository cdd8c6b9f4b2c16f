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
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
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
from tinyexperts.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.device import autocast, choose_device, choose_precision
from tinyexperts.training.progress import TrainingBar

# Sparse table gradients where a step is expected to touch a smaller share of the rows: below it they win, more so the
# fewer rows are touched; above it the dense gradient with a fused AdamW does.
SPARSE_BELOW_SHARE = 0.25


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run was saved; the message says how to resume it."""


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> None:
    """Run a configuration to its end, in its run folder; `resume` goes on from the last checkpoint.

    Raises:
        InputError: bad input, a loss that is not finite, or a disk that is full.
        Interrupted: after Ctrl-C or SIGTERM, when the run is saved.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = TokenDataset.open(config.data)
    if dataset.index.vocab_size != config.model.vocab_size:
        raise InputError(
            f"model.vocab_size must be that of {config.data}, {dataset.index.vocab_size}, got {config.model.vocab_size}"
        )
    loader = TokenLoader(
        dataset.split("train"),
        batch_size=config.batch_size * config.gradient_accumulation,
        context_length=config.model.context_length,
        seed=config.seed,
    )
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    sparse_tables, table_choice = _choose_table_gradients(config)
    torch.manual_seed(config.seed)
    model = Transformer(config.model, sparse_tables=sparse_tables).to(device)
    optimizers = _optimizers(config, model, sparse_tables)
    flops_per_step = 3 * model.flops_per_token(config.model.context_length) * config.tokens_per_step
    num_steps = config.num_steps or int((config.training_flops or 0) // flops_per_step)
    if num_steps < 1:
        raise InputError(
            f"training_flops must pay for one step at least, {flops_per_step:.3g}, got {config.training_flops}"
        )

    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": []}
    if resume:
        state = _resume(config, dataset, model, optimizers) or state
    else:
        run_folder.create(config, dataset.tokenizer, _describe(config, model, num_steps))
    metrics = run_folder.Metrics(config.run, after_step=state["step"])
    bar = TrainingBar(config.run.name, num_steps=num_steps, first_step=state["step"], enabled=progress)
    with closing(metrics), bar, _stop_signal() as stop:
        bar.say(f"{config.run}: {num_steps:,} steps on {device} in {precision}; {table_choice}")
        for step in range(state["step"], num_steps):
            started = time.perf_counter()
            scale_learning_rates(optimizers, _schedule(config, step, num_steps))
            loss, gradient_norm = _step(config, model, optimizers, loader, step, device, precision)
            state["step"] = step + 1
            state["losses"].append(loss)
            seconds = time.perf_counter() - started
            state["seconds"] += seconds
            done = {"num_tokens": (step + 1) * config.tokens_per_step, "training_flops": (step + 1) * flops_per_step}
            if (step + 1) % config.log_every == 0 or step + 1 == num_steps:
                mean_loss = math.fsum(state["losses"]) / len(state["losses"])
                state["losses"] = []
                speed = {
                    "tokens_per_second": config.tokens_per_step / seconds,
                    "flops_per_second": flops_per_step / seconds,
                }
                learning_rate = optimizers[0].param_groups[0]["lr"]
                metrics.write(
                    "train",
                    step + 1,
                    loss=mean_loss,
                    **done,
                    gradient_norm=gradient_norm,
                    learning_rate=learning_rate,
                    seconds=state["seconds"],
                    **speed,
                )
                bar.update(step + 1, loss=mean_loss, **speed)
            if (step + 1) % config.validation_every == 0 or step + 1 == num_steps:
                result = measure_perplexity(
                    model,
                    dataset.split("validation"),
                    context_length=config.model.context_length,
                    batch_size=config.batch_size,
                    max_tokens=config.validation_tokens,
                    forward_context=autocast(precision, device),
                )
                metrics.write("validation", step + 1, loss=result.loss, **done, seconds=state["seconds"])
            stopped = stop()
            if stopped or (step + 1) % config.checkpoint_every == 0 or step + 1 == num_steps:
                _check_weights(config, model, step + 1)
                save_checkpoint(config.run, step + 1, model, optimizers, state, keep=config.keep_checkpoints)
            if stopped and step + 1 < num_steps:
                raise Interrupted(f"{stopped}: saved {config.run} at step {step + 1}; to go on: {_resume_command()}")


def _check_weights(config: TrainConfig, model: Transformer, step: int) -> None:
    """A checkpoint that holds a weight that is not finite must not push out a good one."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            found = checkpoints(config.run)
            raise InputError(
                f"step {step} left weights that are not finite in {name}; "
                + (f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet")
            )


def _step(
    config: TrainConfig,
    model: Transformer,
    optimizers: list[Optimizer],
    loader: TokenLoader,
    step: int,
    device: torch.device,
    precision: str,
) -> tuple[float, float]:
    """One optimiser step; returns the loss in nats a token and the gradient's norm before clipping.

    Raises:
        InputError: a loss or a gradient that is not finite, before any weight has changed.
    """
    model.train()
    batch = loader.batch(step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses = []
    micro_batches = zip(batch.inputs.split(config.batch_size), batch.targets.split(config.batch_size), strict=True)
    for inputs, targets in micro_batches:
        with autocast(precision, device):
            logits = model(inputs.to(device))
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten())
        (loss / config.gradient_accumulation).backward()
        losses.append(loss.detach())
    mean_loss = torch.stack(losses).mean().item()
    gradient_norm = clip_gradient_norm_(model.parameters(), config.gradient_clip).item()
    if not (math.isfinite(mean_loss) and math.isfinite(gradient_norm)):
        found = checkpoints(config.run)
        raise InputError(
            f"step {step + 1} gave a loss of {mean_loss} and a gradient norm of {gradient_norm}, on the sequences "
            f"{batch.sequence_ids.tolist()} of {config.data}; "
            + (f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet")
        )
    for optimizer in optimizers:
        optimizer.step()
    return mean_loss, gradient_norm


def _schedule(config: TrainConfig, step: int, num_steps: int) -> float:
    warmup_steps = round(config.warmup_fraction * num_steps)
    if config.schedule == "cosine":
        return cosine(step, num_steps=num_steps, warmup_steps=warmup_steps)
    decay_steps = min(round(config.decay_fraction * num_steps), num_steps - warmup_steps)
    return warmup_stable_decay(step, num_steps=num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)


def _choose_table_gradients(config: TrainConfig) -> tuple[bool, str]:
    """Whether tables get sparse gradients, and a sentence that says why."""
    layer = config.model.sparse_layer.build(config.model.d_model, device="meta")
    if not isinstance(layer, ProductKeyLayer):
        return False, "no tables"
    share = expected_touched_share(config.tokens_per_step, layer.retrieved_per_token, len(layer.experts))
    sparse = share < SPARSE_BELOW_SHARE if config.table_gradients == "auto" else config.table_gradients == "sparse"
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
    )


def _resume(
    config: TrainConfig, dataset: TokenDataset, model: Transformer, optimizers: list[Optimizer]
) -> dict[str, Any] | None:
    """Load the last checkpoint; None where the run was cut off before its first."""
    run_folder.check_unchanged(config)
    run_folder.check_tokenizer(config.run, dataset)
    found = checkpoints(config.run)
    return load_checkpoint(found[-1], model, optimizers) if found else None


def _describe(config: TrainConfig, model: Transformer, num_steps: int) -> dict[str, Any]:
    count = model.num_parameters()
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
            "total": 3 * model.flops_per_token(config.model.context_length),
        },
        "tokens_per_step": config.tokens_per_step,
        "num_steps": num_steps,
    }


@contextmanager
def _stop_signal() -> Iterator[Any]:
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
