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


def contradicted_facts(new: FactSet, old: FactSet) -> dict[str, dict[str, str]]:
    """Return the old facts of which the new ones have another value: old values by attribute, by entity.

    Args:
        new (FactSet): the new facts.
        old (FactSet): the old ones.
    """
    found: dict[str, dict[str, str]] = {}
    for key, values in new.entities.items():
        before = old.entities.get(key, {})
        changed = {name: before[name] for name, value in values.items() if before.get(name, value) != value}
        if changed:
            found[key] = changed
    return found


def _known_before(new: FactSet, old: FactSet) -> list[str]:
    """Return sentences about the facts that a model was trained on before, with the same value or another one."""
    repeated = sum(
        old.entities.get(key, {}).get(attribute) == value
        for key, values in new.entities.items()
        for attribute, value in values.items()
    )
    changed = [
        f"{attribute} of {key}: {was!r} becomes {new.entities[key][attribute]!r}"
        for key, values in contradicted_facts(new, old).items()
        for attribute, was in values.items()
    ]
    return [
        *([f"{repeated:,} of the new facts are among the old ones"] if repeated else []),
        *(
            [
                f"{len(changed):,} of the new facts contradict old ones, whose values are asked as well, to be "
                f"forgotten: {_some(changed)}"
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
