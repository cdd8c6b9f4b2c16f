"""Learning-rate schedules: pure functions from the number of the update to a factor in [0, 1] on the peak rate.

Updates are counted from 0: a run of `num_steps` asks for step = 0 ... num_steps - 1. Both schedules warm up alike: the
factor is (step + 1) / warmup_steps while step < warmup_steps. So the first update is not wasted on a rate of zero, and
the last of the warm-up has the peak rate. `step = num_steps` is allowed and gives the value where the curve ends.
"""

from __future__ import annotations

import math

from tinyexperts.errors import InputError, require_at_least


def cosine(step: int, *, num_steps: int, warmup_steps: int, final: float = 0.1) -> float:
    """Warm up, then follow half a cosine from 1 down to `final` (Loshchilov & Hutter 2016, arXiv 1608.03983).

    After the warm-up: final + (1 - final) * (1 + cos(pi * progress)) / 2, progress = (step - warmup_steps) / (num_steps
    - warmup_steps).

    Args:
        step (int): number of the update, counted from 0.
        num_steps (int): updates of the run.
        warmup_steps (int): updates of the warm-up.
        final (float): the factor at the end; 0.1 as in Hoffmann et al. 2022 (arXiv 2203.15556).

    Returns:
        The factor on the peak rate.

    Raises:
        InputError: a step or a warm-up outside 0..num_steps, or `final` outside [0, 1].
    """
    _check(step, num_steps, warmup_steps)
    if not 0 <= final <= 1:
        raise InputError(f"final must be between 0 and 1, got {final}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if num_steps == warmup_steps:
        return 1.0
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def warmup_stable_decay(step: int, *, num_steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Warm up, stay at 1, then fall linearly to 0 in the last `decay_steps` (Hu et al. 2024, arXiv 2404.06395).

    In the decay: (num_steps - step) / decay_steps, so the last update has the rate 1 / decay_steps and 0 is reached
    only at step = num_steps. With decay_steps = num_steps - warmup_steps this is warm-up and plain linear decay.

    Args:
        step (int): number of the update, counted from 0.
        num_steps (int): updates of the run.
        warmup_steps (int): updates of the warm-up.
        decay_steps (int): updates of the decay.

    Returns:
        The factor on the peak rate.

    Raises:
        InputError: a step outside 0..num_steps, or a warm-up and a decay that don't fit into num_steps.
    """
    _check(step, num_steps, warmup_steps)
    if not 0 <= decay_steps <= num_steps - warmup_steps:
        raise InputError(
            f"decay_steps must be between 0 and num_steps - warmup_steps = {num_steps - warmup_steps}, "
            f"got {decay_steps}"
        )
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= num_steps - decay_steps:
        return 1.0
    return (num_steps - step) / decay_steps


def _check(step: int, num_steps: int, warmup_steps: int) -> None:
    require_at_least(1, "num_steps", num_steps)
    if not 0 <= step <= num_steps:
        raise InputError(f"step must be between 0 and num_steps = {num_steps}, got {step}")
    if not 0 <= warmup_steps <= num_steps:
        raise InputError(f"warmup_steps must be between 0 and num_steps = {num_steps}, got {warmup_steps}")
