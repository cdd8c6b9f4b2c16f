"""A sample of the texts that a model was trained on: how much each expert is used there, and which texts fire it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from tinyexperts.data import Tokenizer
from tinyexperts.data.shards.reader import TokenSplit
from tinyexperts.evaluation import ExpertUsage, expert_usage, recorded_expert_usage
from tinyexperts.evaluation.fired import recorded_firing
from tinyexperts.explorer.knock_out import ExpertKey
from tinyexperts.model import Transformer, evaluation_mode

SAMPLE_TOKENS = 50_000
# The tokens of a text that are shown before and after one that fires an expert.
_BEFORE, _AFTER = 24, 16
# Tokens of one forward pass: the vectors of every expert that they retrieve are gathered.
_TOKENS_PER_PASS = 512
# The passages that are kept for each expert; a page may leave some out.
_KEPT = 8


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A token of a text of the sample that fires an expert."""

    text: int
    """The number of the text in the sample."""
    place: int
    factor: float


@dataclass(frozen=True, kw_only=True)
class SampleUse:
    """The use of experts by a sample of texts."""

    usage: dict[str, ExpertUsage]
    """The usage by the layer's name."""
    sightings: dict[ExpertKey, list[Sighting]]
    """The texts that fire each expert that was asked for, by the token of each that does it most, the strongest
    first."""


def draw_texts(
    split: TokenSplit, context_length: int, *, num_tokens: int = SAMPLE_TOKENS, seed: int = 0
) -> list[np.ndarray]:
    """Draw documents until they have this many tokens together; of one that the context does not hold, a part.

    Args:
        split (TokenSplit): the documents.
        context_length (int): tokens of a text at most.
        num_tokens (int): tokens of all texts together, but for the last of them that is drawn.
        seed (int): the seed of the draw.

    Returns:
        The ids (int64) of each text, which begin with the end of the text before where a document begins.
    """
    generator = np.random.default_rng(seed)
    texts, missing = [], num_tokens
    for number in generator.permutation(split.num_documents).tolist():
        if missing <= 0:
            break
        text = np.concatenate([[split.end_of_text_id], split.document(number)[:-1]])
        if len(text) > context_length:
            start = int(generator.integers(len(text) - context_length + 1))
            text = text[start : start + context_length]
        texts.append(text)
        missing -= len(text)
    return texts


def use_of_experts(model: Transformer, texts: Sequence[np.ndarray], wanted: Mapping[str, Sequence[int]]) -> SampleUse:
    """Pass texts through a model, and find how much each expert is used and where some of them fire.

    Args:
        model (Transformer): the model, on any device.
        texts (Sequence[np.ndarray]): the texts' ids, no longer than the context.
        wanted (Mapping[str, Sequence[int]]): ids of experts by the layer's name, to be found in the texts.
    """
    device = next(model.parameters()).device
    hits: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    ids_of = {name: torch.tensor(ids, device=device) for name, ids in wanted.items()}
    with (
        evaluation_mode(model),
        torch.no_grad(),
        recorded_expert_usage(model) as sums,
        recorded_firing(model) as firing,
    ):
        for numbers in equally_long(texts):
            model(torch.from_numpy(np.stack([texts[number] for number in numbers])).to(device))
            for name, ids in ids_of.items():
                found = firing[name]
                where = torch.isin(found.ids, ids).nonzero(as_tuple=True)
                text_numbers = torch.tensor(numbers, device=device)[where[0]]
                columns = (found.ids[where], text_numbers, where[1], found.factors[where])
                hits[name].append(torch.stack([column.double() for column in columns], 1).cpu().numpy())
    return SampleUse(
        usage={name: expert_usage(total) for name, total in sums.items()},
        sightings={
            (name, id_): _strongest(np.concatenate(hits[name]), id_) for name, ids in wanted.items() for id_ in ids
        },
    )


def passage(tokenizer: Tokenizer, text: np.ndarray, place: int) -> str:
    """Return the passage around a token of a text on one line, the token between angle quotes."""
    start, end = max(0, place - _BEFORE), min(len(text), place + 1 + _AFTER)

    def words(first: int, last: int) -> str:
        return tokenizer.decode(text[first:last][text[first:last] != tokenizer.end_of_text_id].tolist())

    token = words(place, place + 1) or "end of text"
    core = token.strip()
    left, right = token.split(core, 1) if core else ("", "")  # white space stays outside of the quotes
    line = f"{words(start, place)}{left}\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}{core or token}"
    line += f"\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}{right}{words(place + 1, end)}"
    return f"{'... ' if start else ''}{' '.join(line.split())}{' ...' if end < len(text) else ''}"


def equally_long(texts: Sequence[np.ndarray]) -> list[list[int]]:
    """Gather the numbers of texts of one length into batches, so that none is padded."""

    def length(number: int) -> int:
        return len(texts[number])

    batches = []
    for tokens, group in groupby(sorted(range(len(texts)), key=length), key=length):
        numbers, size = list(group), max(1, _TOKENS_PER_PASS // tokens)
        batches += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return batches


def _strongest(hits: np.ndarray, id_: int) -> list[Sighting]:
    """Return the strongest hits [., (id, text, place, factor)] of an expert, one a text."""
    own = hits[(hits[:, 0] == id_) & (hits[:, 3] != 0)]
    found: dict[int, Sighting] = {}
    for _, text, place, factor in own[np.argsort(-np.abs(own[:, 3]), kind="stable")].tolist():
        found.setdefault(int(text), Sighting(text=int(text), place=int(place), factor=factor))
        if len(found) == _KEPT:
            break
    return list(found.values())
