"""Perplexity and bits per byte of a language model on tokens, and the loss split by what copying could have found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.data import EncodedText, TokenSplit, evaluation_windows
from tinyexperts.model import Transformer, evaluation_mode


@dataclass(frozen=True, kw_only=True)
class LossByCopy:
    """Loss in nats a token, split by whether the token's bigram stood earlier in its context.

    Early in training a model learns to copy such tokens, at a moment that differs from seed to seed; the loss on the
    new ones is the steadier measure of what its layers store.
    """

    new: float
    stood_earlier: float
    share_stood_earlier: float


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The loss of a model on a text; `num_bytes` is None where it was cut off or the tokenizer lost some of it."""

    loss: float
    """Loss in nats a token."""
    num_tokens: int
    num_bytes: int | None
    loss_by_copy: LossByCopy

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else None


def measure_perplexity(
    model: Transformer,
    split: TokenSplit | EncodedText,
    *,
    context_length: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    forward_context: AbstractContextManager[object] | None = None,
    ranks: dist.ProcessGroup | None = None,
) -> Perplexity:
    """Measure the loss of every token of the split, in windows without common context; the model evaluates meanwhile.

    Args:
        model (Transformer): the model, on any device.
        split (TokenSplit | EncodedText): the tokens.
        context_length (int): the tokens of a window.
        batch_size (int): the windows of a forward pass.
        max_tokens (int | None): take whole windows, evenly spread over the split, until they hold this many tokens;
            bits per byte are not known then.
        forward_context (AbstractContextManager | None): the context of the forward pass, for example autocast.
        ranks (ProcessGroup | None): processes that share the windows; each makes the same number of forward passes, and
            all get the result.

    Returns:
        The loss, and the numbers of tokens and bytes.

    Raises:
        InputError: a context, or a number of tokens, that is not positive.
    """
    device = next(model.parameters()).device
    sums, counts = np.zeros(2), np.zeros(2, dtype=np.int64)
    # FSDP2 trains with what it gathers here.
    no_gradients = torch.inference_mode() if ranks is None else torch.no_grad()
    with evaluation_mode(model), no_gradients:
        for inputs, targets in _batches(split, context_length, batch_size, max_tokens):
            rows, num_own = _share(len(inputs), ranks)
            with forward_context or nullcontext():
                logits = model(inputs[rows].to(device))
            own = rows[:num_own]
            losses = F.cross_entropy(
                logits[:num_own].float().flatten(0, 1), targets[own].to(device).flatten(), reduction="none"
            )
            stood_earlier = bigram_stood_earlier(inputs[own], targets[own])
            for kind in (0, 1):
                chosen = losses.cpu()[stood_earlier.flatten() == bool(kind)].double()
                sums[kind] += chosen.sum().item()
                counts[kind] += chosen.numel()
    if ranks is not None:
        dist.all_reduce(torch.from_numpy(sums), group=ranks)
        dist.all_reduce(torch.from_numpy(counts), group=ranks)
    num_tokens = int(counts.sum())
    means = [float(total / count) if count else math.nan for total, count in zip(sums, counts, strict=True)]
    return Perplexity(
        loss=float(sums.sum() / num_tokens),
        num_tokens=num_tokens,
        num_bytes=split.num_bytes if num_tokens == split.num_tokens else None,
        loss_by_copy=LossByCopy(
            new=means[0], stood_earlier=means[1], share_stood_earlier=float(counts[1] / num_tokens)
        ),
    )


def _share(num_windows: int, ranks: dist.ProcessGroup | None) -> tuple[list[int], int]:
    """Return this rank's windows of a batch, as many as every other rank's, and how many of them are to be counted."""
    rank, num_ranks = (0, 1) if ranks is None else (dist.get_rank(ranks), ranks.size())
    own = list(range(rank, num_windows, num_ranks))
    return own + [0] * (-(-num_windows // num_ranks) - len(own)), len(own)


def bigram_stood_earlier(inputs: Tensor, targets: Tensor) -> Tensor:
    """Mark the places of which (input, target) has occurred earlier in the row.

    Args:
        inputs (int64, [B, T]): the tokens.
        targets (int64, [B, T]): the token that follows each.

    Returns:
        earlier (bool, [B, T]): True at such places.
    """
    bigrams = (inputs << 32 | targets).numpy()
    earlier = np.ones(bigrams.shape, dtype=bool)
    for row, bigrams_T in enumerate(bigrams):
        earlier[row, np.unique(bigrams_T, return_index=True)[1]] = False
    return torch.from_numpy(earlier)


def _batches(
    split: TokenSplit | EncodedText, context_length: int, batch_size: int, max_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows in order, batch_size together; the last window, which is shorter, alone."""
    max_windows = None if max_tokens is None else math.ceil(max_tokens / context_length)
    windows = enumerate(evaluation_windows(split, context_length, max_windows=max_windows))
    for _, group in groupby(windows, key=lambda item: (item[0] // batch_size, len(item[1][0]))):
        inputs, targets = zip(*(window for _, window in group), strict=True)
        yield torch.stack(inputs), torch.stack(targets)
