"""One optimizer step, which changes the weights, or nothing if it would spoil them."""

from __future__ import annotations

import math
import statistics
from contextlib import nullcontext

import torch

from tinyexperts.errors import InputError
from tinyexperts.optim import clip_gradient_norm_, deferred_gradients
from tinyexperts.training.checkpoint import last_good_checkpoint
from tinyexperts.training.device import autocast
from tinyexperts.training.run import Run


class Diverged(InputError):
    """A loss or a gradient is not finite: the same run would come to the same point again."""


def optimizer_step(run: Run, step: int) -> tuple[float, float]:
    """Make one step; all ranks call it together.

    Args:
        run (Run): the run, whose weights and optimizers' states change.
        step (int): the number of the step, from 0, which determines its batches.

    Returns:
        The mean loss before the step in nats a token, that of old texts left out, and the gradient's norm before
        clipping.

    Raises:
        Diverged: a loss or a gradient is not finite; no weight has changed.
    """
    config, ranks = run.config, run.ranks
    memory, row_choice = (run.teaching.memory, run.teaching.row_choice) if run.teaching else (None, None)
    run.model.train()
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses, sequence_ids = [], []
    for micro_batch in range(config.gradient_accumulation):
        number = step * config.gradient_accumulation + micro_batch
        batch = run.loader.batch(number)
        counted = nullcontext() if row_choice is None else row_choice.counted()
        with autocast(run.precision, run.device), counted:
            loss = run.model.loss(batch.inputs.to(run.device), batch.targets.to(run.device))
        # Gradients are summed over micro-batches and ranks, so that those of the mean loss come out.
        with deferred_gradients(run.optimizers):
            torch.autograd.backward(loss / (config.gradient_accumulation * ranks.size))
        if memory is not None:
            with autocast(run.precision, run.device):
                kept = memory.loss(run.model, number)
            with deferred_gradients(run.optimizers):
                torch.autograd.backward(kept / config.gradient_accumulation)
        losses.append(loss.detach())
        sequence_ids += batch.sequence_ids.tolist()
    if row_choice is not None:
        row_choice.restrict_gradients()
    mean_loss = statistics.fmean(ranks.all_gather_scalar(torch.stack(losses).mean().item()))
    gradient_norm = clip_gradient_norm_(run.model.parameters(), config.optimizer.gradient_clip, ranks.groups).item()
    if not (math.isfinite(mean_loss) and math.isfinite(gradient_norm)):
        of_all = [sequence for of_rank in ranks.all_gather_object(sequence_ids) for sequence in of_rank]
        raise Diverged(
            f"step {step + 1} gave a loss of {mean_loss} and a gradient norm of {gradient_norm}, on the sequences "
            f"{of_all} of {config.data}; {last_good_checkpoint(config.run)}"
        )
    for optimizer in run.optimizers:
        optimizer.step()
    return mean_loss, gradient_norm
