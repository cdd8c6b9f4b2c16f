"""Training batches as a pure function of (seed, step), and the windows over which perplexity is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tinyexperts.data.encoded_text import EncodedText
from tinyexperts.data.shards.reader import TokenSplit
from tinyexperts.errors import InputError


@dataclass(frozen=True)
class Batch:
    """The rows of one step."""

    inputs: torch.Tensor
    """The token ids (int64 [B, T])."""
    targets: torch.Tensor
    """The token that follows each input (int64 [B, T])."""
    sequence_ids: torch.Tensor
    """The number of each row's window (int64 [B]); window w starts at token w * T of the split."""


class TokenLoader:
    """A server of shuffled windows of a split; it remembers nothing between steps, so any step can be the first.

    Window w holds the T + 1 tokens from w * T on: neighbors share one token, so that each token but the first is
    predicted in one window. The tokens after the last whole window, fewer than T, are left out. Each epoch visits every
    window once in an order drawn from (seed, epoch); a batch may hold the end of one epoch and the start of the next.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Plan the batches.

        Args:
            split (TokenSplit): the tokens.
            batch_size (int): rows B of a batch, over all ranks.
            context_length (int): tokens T of a row.
            seed (int): the seed of the windows' order.
            rank (int): the number of this rank.
            num_ranks (int): the number of ranks that share a batch.

        Raises:
            InputError: sizes that are not positive, a batch that the ranks cannot share evenly, a context longer than
                the split.
        """
        if batch_size < 1 or context_length < 1:
            raise InputError(f"batch_size and context_length must be positive, got {batch_size} and {context_length}")
        if num_ranks < 1 or not 0 <= rank < num_ranks:
            raise InputError(f"rank must be between 0 and num_ranks - 1, got rank {rank} of {num_ranks}")
        if batch_size % num_ranks:
            raise InputError(f"batch_size must be a multiple of the {num_ranks} ranks, got {batch_size}")
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        self.num_windows = (split.num_tokens - 1) // context_length
        if self.num_windows < 1:
            raise InputError(
                f"context_length must be at most {split.num_tokens - 1}, as the {split.name} split has "
                f"{split.num_tokens} tokens, got {context_length}"
            )
        self.split = split
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self._rows = range(rank * batch_size // num_ranks, (rank + 1) * batch_size // num_ranks)
        self._order_of_epoch: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> Batch:
        """Return this rank's rows of a step; the rows of all ranks in order are the batch of a single rank.

        Args:
            step (int): the number of the step, from 0.

        Raises:
            InputError: a negative step.
        """
        if step < 0:
            raise InputError(f"step must not be negative, got {step}")
        first = step * self.batch_size
        windows = [self._window_at(first + row) for row in self._rows]
        ids = np.empty((len(windows), self.context_length + 1), dtype=np.int64)
        for row, window in enumerate(windows):
            start = window * self.context_length
            ids[row] = self.split.tokens[start : start + self.context_length + 1]
        tokens = torch.from_numpy(ids)
        # The device by name: torch would take its default one otherwise.
        sequence_ids = torch.tensor(windows, dtype=torch.int64, device="cpu")
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), sequence_ids)

    def _window_at(self, position: int) -> int:
        epoch, index = divmod(position, self.num_windows)
        # Kept because a permutation of millions of windows takes longer than the step that needs a few of them.
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            self._order_of_epoch = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_windows)
        return int(self._order_of_epoch[1][index])


def evaluation_windows(
    split: TokenSplit | EncodedText, context_length: int, *, max_windows: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield windows in order in which every token of the split is a target exactly once.

    The first token is predicted from the end-of-text token, so that the targets are `split.num_tokens` in all and bits
    per byte, their negative log2 likelihood divided by `split.num_bytes` where that is known, are exact.

    Args:
        split (TokenSplit | EncodedText): the tokens.
        context_length (int): tokens T of a window.
        max_windows (int | None): yield at most this many, evenly spread over the split; only these are read.

    Yields:
        inputs (int64 [T]) and targets (int64 [T]); T = context_length, less in the last window.

    Raises:
        InputError: a context or a number of windows that is not positive.
    """
    if context_length < 1 or (max_windows is not None and max_windows < 1):
        raise InputError(f"context_length and max_windows must be positive, got {context_length} and {max_windows}")
    num_windows = -(-split.num_tokens // context_length)
    num_chosen = num_windows if max_windows is None else min(max_windows, num_windows)
    return (_window(split, context_length, number * num_windows // num_chosen) for number in range(num_chosen))


def _window(split: TokenSplit | EncodedText, context_length: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    start = number * context_length
    previous = split.tokens[start - 1 : start] if start else [split.end_of_text_id]
    tokens = torch.from_numpy(np.concatenate([previous, split.tokens[start : start + context_length]]))
    return tokens[:-1].clone(), tokens[1:].clone()
