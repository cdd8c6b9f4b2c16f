"""The data set of what is taught, the old values that it contradicts, and the sentences that are told about it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from tinyexperts.data import PrepareConfig, TokenDataset, Tokenizer, prepare
from tinyexperts.data.facts.fact_set import FactSet
from tinyexperts.data.facts.table import read_fact_table
from tinyexperts.training.run_folder import check_tokenizer
from tinyexperts.training.teach_config import TeachConfig

_NAMED_AT_MOST = 5
_KEY_COLUMN = "(key)"


def prepared_data(config: TeachConfig, base: Path, old_data: Sequence[TokenDataset]) -> TokenDataset:
    """Return the data set of what is new, and make it where it is missing, in the phrasings of old facts.

    They are those of the last data set that has all of its attributes, or else of the first of facts.
    """
    if config.data is not None:
        dataset = TokenDataset.open(config.data)
        check_tokenizer(base, dataset)
        return dataset
    folder = config.folder / "data"
    if not folder.exists():
        of_facts = {
            "facts": config.facts,
            "key": config.key,
            "attributes": config.attributes,
            "phrasings": config.phrasings or _phrasings(config, old_data),
            "every_fact": True,
        }
        prepare(
            PrepareConfig(
                **({"files": config.files} if config.files else of_facts),
                tokenizer=str(base / "tokenizer.json"),
                output=folder,
                seed=config.seed,
            )
        )
    return TokenDataset.open(folder)


def _phrasings(config: TeachConfig, old_data: Sequence[TokenDataset]) -> Path | None:
    if config.facts is None or config.key is None:
        return None
    attributes = set(read_fact_table(config.facts, key=config.key, attributes=config.attributes).attributes)
    of_facts = [(dataset.folder, facts.fact_set) for dataset in old_data if (facts := dataset.split("train").facts)]
    with_all = [folder for folder, fact_set in of_facts if attributes <= set(fact_set.attributes)]
    return with_all[-1] if with_all else of_facts[0][0] if of_facts else None


def contradicted_data(
    config: TeachConfig, base: Path, new_data: TokenDataset, old_data: Sequence[TokenDataset]
) -> TokenDataset | None:
    """Return the data set of the old values that new facts contradict, to be asked; None where there are none."""
    new = new_data.split("validation").facts
    facts: dict[str, dict[str, str]] = {}
    for dataset in old_data:  # the last that was taught counts
        if new is not None and (old := dataset.split("train").facts) is not None:
            for key, values in contradicted_facts(new.fact_set, old.fact_set).items():
                facts.setdefault(key, {}).update(values)
    if not facts:
        return None
    folder, table = config.folder / "contradicted", config.folder / "contradicted.csv"
    if not folder.exists():
        attributes = list(dict.fromkeys(name for values in facts.values() for name in values))
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [_KEY_COLUMN, *attributes])
            writer.writeheader()
            writer.writerows({_KEY_COLUMN: key, **values} for key, values in facts.items())
        prepare(
            PrepareConfig(
                facts=table,
                key=_KEY_COLUMN,
                phrasings=new_data.folder,
                every_fact=True,
                tokenizer=str(base / "tokenizer.json"),
                output=folder,
            )
        )
    return TokenDataset.open(folder)


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
