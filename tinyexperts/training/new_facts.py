"""Sentences about new facts, told when they are taught: known ones, contradictions, words that fall into letters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tinyexperts.data import TokenDataset, Tokenizer
from tinyexperts.data.facts.fact_set import FactSet

_NAMED_AT_MOST = 5


def remarks(new_data: TokenDataset, old_data: Iterable[TokenDataset]) -> tuple[str, ...]:
    """Return sentences about new facts, none about texts.

    Args:
        new_data (TokenDataset): the data set of what is new.
        old_data (Iterable[TokenDataset]): those that the model was trained on, as far as they are there.
    """
    new = new_data.split("train").facts
    if new is None:
        return ()
    found = [_split_words(new_data.tokenizer, new.fact_set)]
    for dataset in old_data:
        old = dataset.split("train").facts
        if old is not None:
            found += _known_before(new.fact_set, old.fact_set)
    return tuple(filter(None, found))


def _known_before(new: FactSet, old: FactSet) -> list[str]:
    """Return sentences about the facts that a model was trained on before, with the same value or another one."""
    shared = [
        (key, attribute, old.entities[key][attribute], value)
        for key, values in new.entities.items()
        for attribute, value in values.items()
        if attribute in old.entities.get(key, {})
    ]
    repeated = sum(before == value for *_, before, value in shared)
    changed = [
        f"{attribute} of {key}: {was!r} becomes {value!r}" for key, attribute, was, value in shared if was != value
    ]
    return [
        *([f"{repeated:,} of the new facts are among the old ones"] if repeated else []),
        *(
            [
                f"{len(changed):,} of the new facts contradict old ones, which count as forgotten when they are "
                f"learned: {_some(changed)}"
            ]
            if changed
            else []
        ),
    ]


def _split_words(tokenizer: Tokenizer, facts: FactSet) -> str:
    """Return a sentence about the words that the tokenizer has no token for a part of, or nothing."""
    texts = [*facts.entities, *(value for values in facts.entities.values() for value in values.values())]
    words = sorted({word for text in texts for word in text.split() if len(word) > 3})
    ids = tokenizer.encode_batch([f" {word}" for word in words])
    split = [word for word, tokens in zip(words, ids, strict=True) if len(tokens) > len(word.encode()) - 1]
    if not split:
        return ""
    return f"{len(split):,} of {len(words):,} new words are split into single letters by the tokenizer: {_some(split)}"


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _NAMED_AT_MOST:,} more" if len(items) > _NAMED_AT_MOST else ""
    return "; ".join(items[:_NAMED_AT_MOST]) + more
