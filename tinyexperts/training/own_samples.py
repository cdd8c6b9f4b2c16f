"""Texts that a model writes itself: what it remembers by where the texts that it was trained on are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import torch

from tinyexperts.data import Tokenizer
from tinyexperts.model import Transformer, generate

_SEQUENCES = 64


def write_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    seed: int,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> Iterator[str]:
    """Yield texts that a model writes from their beginning, drawn token by token at temperature 1.

    A text that the context cuts off is left out where a whole one stands before it in the same sequence.

    Args:
        model (Transformer): the model.
        tokenizer (Tokenizer): its tokenizer.
        num_tokens (int): tokens to draw, rounded up to whole batches of sequences.
        seed (int): the seed of the draws.
        advance (Callable[[int], None]): called with the number of tokens that were drawn, for a display.
    """
    device = model.embedding.weight.device
    generator, end = torch.Generator(device).manual_seed(seed), tokenizer.end_of_text_id
    start = torch.full((_SEQUENCES, 1), end, device=device)
    length = model.config.context_length - 1
    for _ in range(0, num_tokens, _SEQUENCES * length):
        drawn = generate(model, start, max_new_tokens=length, generator=generator)[:, 1:]
        advance(drawn.numel())
        for row in drawn.tolist():
            texts = [list(ids) for is_end, ids in groupby(row, key=lambda token: token == end) if not is_end]
            is_cut_off = bool(texts) and row[-1] != end
            for ids in texts[:-1] if is_cut_off and len(texts) > 1 else texts:
                yield tokenizer.decode(ids)
