"""The training loop: one run from its configuration to its last checkpoint.

Everything that the next step depends on is in the checkpoint, and batches are a pure function of (seed, step), so that
a resumed run continues bit for bit.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from tinyexperts.training.checkpoint import CheckpointWriter, checkpoints, is_finite, load_checkpoint
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.device import autocast, choose_device, choose_precision, out_of_memory_told
from tinyexperts.training.progress import TrainingBar
from tinyexperts.training.ranks import ALONE, Ranks, joined
from tinyexperts.training.sharding import give_back_gathered, shard_dense_part

# On devices without a fused step of their own: sparse table gradients where a step is expected to touch a smaller share
# of the rows; above it the dense gradient with a fused AdamW wins. On the CPU the fused step wins at any share.
SPARSE_BELOW_SHARE = 0.25


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run was saved; the message says how to resume it."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run is made of; only the weights and the optimisers' states change."""

    config: TrainConfig
    ranks: Ranks
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

    Under torchrun all ranks call it, and train one model together; the first of them writes the run folder.

    Raises:
        InputError: bad input, a loss that is not finite, or a disk that is full.
        Interrupted: after Ctrl-C or SIGTERM, when the run is saved.
        LostRank: a rank did not answer.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(config))
        resume = _resumption_agreed(resume, config, ranks)
        with ranks.refused_together():
            run = _prepare(config, ranks)
        _check_same_data(run)
        with ranks.refused_together():
            _claim_folder(run, resume, stack)
        ranks.note_begun()
        state: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": []}
        # None where the run was cut off before its first; the first rank's, since a folder may lag elsewhere.
        if resume and (found := ranks.all_of(checkpoints(config.run))[0]):
            state = load_checkpoint(found[-1], run.model, run.optimizers, ranks=ranks)
        if state["step"] >= run.num_steps:
            if ranks.is_first:
                print(f"{config.run} is finished: it has made all its {run.num_steps:,} steps", file=sys.stderr)
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
        with ranks.refused_together():
            if ranks.is_first:
                metrics = run_folder.Metrics(config.run, after_step=state["step"])
                stack.callback(metrics.close)
        stop = stack.enter_context(_stop_signal())
        bar.say(f"{config.run}: {run.num_steps:,} steps on {_place(run)} in {run.precision}; {run.table_choice}")
        _steps(run, state, metrics, bar, stop)


def _resumption_agreed(resume: bool, config: TrainConfig, ranks: Ranks) -> bool:
    """Whether to go on from a checkpoint: as told, or where torchrun has started the ranks of a run again."""
    told = ranks.all_of((resume, run_folder.is_run(config.run)))
    if len({asked for asked, _ in told}) > 1:
        with_it = ", ".join(str(rank) for rank, (asked, _) in enumerate(told) if asked)
        raise InputError(f"all ranks must be started with --resume, or none; got it on {with_it} of {ranks.size} alone")
    return resume or (ranks.restarted and told[0][1])


def _check_same_data(run: _Run) -> None:
    told = run.ranks.all_of(run.dataset.sha256[:12])
    if len(set(told)) > 1:
        raise InputError(f"all ranks must have the same data in {run.config.data}, got sha256 {', '.join(told)}")


def _claim_folder(run: _Run, resume: bool, stack: ExitStack) -> None:
    """Begin the run's folder, or see that it is this run's; held, by the first rank, until the stack is left."""
    folder = run.config.run
    if not run.ranks.is_first:
        return
    if resume:
        run_folder.check_unchanged(run.config)
    else:
        run_folder.check_free(folder)
    stack.enter_context(run_folder.held(folder))
    if resume:
        run_folder.check_data(folder, run.dataset)
    else:
        run_folder.create(run.config, run.dataset.tokenizer, _describe(run))


def _place(run: _Run) -> str:
    """Where it is computed, in words."""
    if run.ranks.mesh is None:
        return str(run.device)
    return f"{run.ranks.size} ranks ({' x '.join(map(str, run.ranks.mesh.shape))}) on {run.device.type}"


def _prepare(config: TrainConfig, ranks: Ranks = ALONE) -> _Run:
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
        batch_size=config.batch_size,
        context_length=config.model.context_length,
        seed=config.seed,
        rank=ranks.rank,
        num_ranks=ranks.size,
    )
    device = choose_device(config.device)
    sparse_tables, table_choice = choose_table_gradients(config, device)
    torch.manual_seed(config.seed)
    with out_of_memory_told(device):
        model = Transformer(config.model, sparse_tables=sparse_tables, ranks=ranks.groups).to(device)
        if ranks.mesh is not None:
            shard_dense_part(model, ranks)
    flops_per_step = 3 * model.flops_per_token(config.model.context_length) * config.tokens_per_step
    num_steps = config.num_steps or int((config.training_flops or 0) // flops_per_step)
    if num_steps < 1:
        raise InputError(
            f"training_flops must pay for one step at least, {flops_per_step:.3g}, got {config.training_flops}"
        )
    return _Run(
        config=config,
        ranks=ranks,
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
    run: _Run, state: dict[str, Any], metrics: run_folder.Metrics | None, bar: TrainingBar, stop: Callable[[], int]
) -> None:
    """The loop: what `state` says was done is not done again."""
    config = run.config
    with CheckpointWriter(
        config.run, keep=config.keep_checkpoints, ranks=run.ranks, asynchronous=config.asynchronous_checkpoints
    ) as writer:
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
                _record(run, metrics, "train", step, loss=mean_loss, **done, **numbers, **speed)
                bar.update(step, loss=mean_loss, **speed)
            if step % config.validation_every == 0 or is_last:
                validation_loss = _validation_loss(run)
                _record(run, metrics, "validation", step, loss=validation_loss, **done, seconds=state["seconds"])
            stopped = int(max(run.ranks.numbers(stop())))
            if stopped or step % config.checkpoint_every == 0 or is_last:
                _check_weights(run, step)
                writer.save(step, run.model, run.optimizers, state)
            if stopped and not is_last:
                writer.wait()
                name = signal.Signals(stopped).name
                raise Interrupted(f"{name}: saved {config.run} at step {step}; to go on: {_resume_command(run.ranks)}")


def _record(run: _Run, metrics: run_folder.Metrics | None, split: str, step: int, **values: float) -> None:
    """Write a measurement; that there is no room for it all ranks are told."""
    with run.ranks.refused_together():
        if metrics is not None:
            metrics.write(split, step, **values)


def _validation_loss(run: _Run) -> float:
    result = measure_perplexity(
        run.model,
        run.dataset.split("validation"),
        context_length=run.config.model.context_length,
        batch_size=run.config.batch_size,
        max_tokens=run.config.validation_tokens,
        forward_context=autocast(run.precision, run.device),
        ranks=None if run.ranks.groups is None else run.ranks.groups.tokens,
    )
    give_back_gathered(run.model)
    return result.loss


def _check_weights(run: _Run, step: int) -> None:
    """A checkpoint that holds a weight that is not finite must not push out a good one."""
    with run.ranks.refused_together():
        for name, parameter in run.model.named_parameters():
            if not is_finite(parameter):
                raise InputError(
                    f"step {step} left weights that are not finite in {name}; {_last_good_checkpoint(run)}"
                )


def _last_good_checkpoint(run: _Run) -> str:
    found = checkpoints(run.config.run)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def _step(run: _Run, step: int) -> tuple[float, float]:
    """One optimiser step; returns the loss in nats a token and the gradient's norm before clipping.

    Raises:
        InputError: a loss or a gradient that is not finite, before any weight has changed.
    """
    config, ranks = run.config, run.ranks
    run.model.train()
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses, sequence_ids = [], []
    for micro_batch in range(config.gradient_accumulation):
        batch = run.loader.batch(step * config.gradient_accumulation + micro_batch)
        with autocast(run.precision, run.device):
            loss = run.model.loss(batch.inputs.to(run.device), batch.targets.to(run.device))
        # Gradients are summed over micro-batches and ranks, so that those of the mean loss come out.
        (loss / (config.gradient_accumulation * ranks.size)).backward()
        losses.append(loss.detach())
        sequence_ids += batch.sequence_ids.tolist()
    mean_loss = statistics.fmean(ranks.numbers(torch.stack(losses).mean().item()))
    gradient_norm = clip_gradient_norm_(run.model.parameters(), config.gradient_clip, ranks.groups).item()
    if not (math.isfinite(mean_loss) and math.isfinite(gradient_norm)):
        of_all = [sequence for of_rank in ranks.all_of(sequence_ids) for sequence in of_rank]
        raise InputError(
            f"step {step + 1} gave a loss of {mean_loss} and a gradient norm of {gradient_norm}, on the sequences "
            f"{of_all} of {config.data}; {_last_good_checkpoint(run)}"
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


def choose_table_gradients(config: TrainConfig, device: torch.device) -> tuple[bool, str]:
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
        "command": _command(run.ranks, sys.argv[1:]),
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
        "tokens_per_step": run.config.tokens_per_step,
        "num_steps": run.num_steps,
    }


@contextmanager
def _stop_signal() -> Iterator[Callable[[], int]]:
    """Yield a function that says which of Ctrl-C and SIGTERM has come, 0 if none; a second Ctrl-C stops at once."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _resume_command(ranks: Ranks) -> str:
    return _command(ranks, [*(argument for argument in sys.argv[1:] if argument != "--resume"), "--resume"])


def _command(ranks: Ranks, arguments: list[str]) -> str:
    """What starts the run; how several nodes find each other is left to the reader.

    Without the two dashes torchrun would take --run for the beginning of an option of its own.
    """
    if ranks.size == 1:
        return shlex.join(["tinyexperts", *arguments])
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    nodes = [] if of_node == ranks.size else ["--nnodes", str(ranks.size // of_node)]
    return shlex.join(["torchrun", *nodes, "--nproc-per-node", str(of_node), "-m", "--", "tinyexperts", *arguments])
