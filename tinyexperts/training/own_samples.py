"""Texts that a model writes itself: what it remembers by where the texts that it was trained on are gone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from rich.console import Console
from rich.progress import Progress

from tinyexperts.data import PrepareConfig, TokenDataset, Tokenizer, prepare
from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically
from tinyexperts.model import Transformer, generate
from tinyexperts.training.config import MemoryConfig

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


def open_texts(memory: MemoryConfig, teacher: Transformer | None, *, seed: int, progress: bool = False) -> TokenDataset:
    """Return the data set of a memory; where it is missing the teacher writes it.

    Beside the data set stand its texts (.jsonl), and what they took (.json: tokens drawn, seconds).

    Args:
        memory (MemoryConfig): the memory.
        teacher (Transformer | None): the model of its teacher, which writes; None: it has none.
        seed (int): the seed of the draws.
        progress (bool): show a progress bar.

    Raises:
        InputError: no data set there, and no tokens to draw; texts that are of no use.
    """
    folder, run, tokens = memory.data, memory.teacher, memory.sample_tokens
    if folder.exists() or teacher is None or run is None or tokens is None:
        return TokenDataset.open(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    drawn: list[int] = []
    tokenizer_path = run / "tokenizer.json"
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("own samples", total=tokens)

        def advance(number: int) -> None:
            drawn.append(number)
            bar.advance(task, number)

        written = write_texts(
            *(teacher, Tokenizer.load(tokenizer_path)),
            num_tokens=tokens,
            seed=seed,
            advance=advance,
        )
        lines = "".join(json.dumps({"text": text}) + "\n" for text in written if text.strip())
    texts = folder.with_suffix(".jsonl")
    texts.write_text(lines, encoding="utf-8")
    took = {"sample_tokens": sum(drawn), "seconds": time.perf_counter() - started}
    write_atomically(folder.with_suffix(".json"), json.dumps(took))
    try:
        prepare(PrepareConfig(files=(texts,), tokenizer=str(tokenizer_path), output=folder))
    except InputError as error:
        raise InputError(
            f"the texts that {run} writes itself are of no use ({error}): remember data or nothing"
        ) from error
    return TokenDataset.open(folder)
