"""The statements that a table's facts become, and those of them that are held out, by design and not by chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import takewhile
from pathlib import Path

import numpy as np

from tinyexperts.data.facts.fact_set import FactSet, write_split_facts
from tinyexperts.data.facts.phrasings import Phrasing
from tinyexperts.data.facts.table import FactTable
from tinyexperts.data.shards.index import FACT_SPLIT_NAMES, SPLIT_NAMES, FileRecord, SplitName
from tinyexperts.data.tokenizer import Tokenizer
from tinyexperts.errors import InputError


@dataclass(frozen=True)
class Statement:
    """A fact in one phrasing: one document."""

    split: SplitName
    """train; validation: a fact that is stated in training in other phrasings; unseen-phrasing: the same facts, in a
    phrasing that no training statement has; unseen-entities: facts of entities that no training statement names."""
    entity: int
    attribute: int
    phrasing: int
    question: str
    """The statement up to the value."""
    text: str


def make_statements(
    table: FactTable,
    phrasings: Mapping[str, Sequence[Phrasing]],
    *,
    seed: int,
    held_out_fraction: float | None,
) -> list[Statement]:
    """Return the statements of all splits, in an order drawn by the seed.

    Every fact is stated in every phrasing of its attribute but the last, which no training statement has.

    Args:
        table (FactTable): the facts.
        phrasings (Mapping[str, Sequence[Phrasing]]): three or more of each attribute.
        seed (int): decides what is held out, and the order.
        held_out_fraction (float | None): the share of the statements, at most one a fact, that go to validation; the
            same facts in the last phrasing are unseen-phrasing, and the same share of entities is never stated in
            training. None: all facts are trained, and validation has each of them in the last phrasing.

    Raises:
        InputError: too few entities, or a share that takes more than one statement of some fact.
    """
    generator = np.random.default_rng(seed)
    keys = table.keys
    if held_out_fraction is None:
        every = [
            _state("train" if phrasing < len(phrasings[name]) - 1 else "validation", table, phrasings, *fact, phrasing)
            for fact in _facts_of(table)
            for name in [table.attributes[fact[1]]]
            for phrasing in range(len(phrasings[name]))
        ]
        return [every[number] for number in generator.permutation(len(every))]
    share = Fraction(str(held_out_fraction))
    order = generator.permutation(len(keys))
    num_unseen = math.ceil(share * len(keys))
    if num_unseen >= len(keys):
        raise InputError(
            f"{num_unseen} of {len(keys)} entities would be held out at a fraction of {held_out_fraction}, and none "
            "would be left to train on"
        )
    unseen = set(order[:num_unseen].tolist())
    facts = _facts_of(table)
    known = [fact for fact in facts if fact[0] not in unseen]
    num_trained = {attribute: len(phrasings[name]) - 1 for attribute, name in enumerate(table.attributes)}
    num_validation = math.ceil(share * sum(num_trained[attribute] for _, attribute in known))
    if num_validation > len(known):
        raise InputError(
            f"at most one statement of each fact can be held out, and a fraction of {held_out_fraction} takes "
            f"{num_validation} of {len(known)} facts"
        )
    held_out = {known[number] for number in generator.permutation(len(known))[:num_validation]}

    def state(split: SplitName, *numbers: int) -> Statement:
        return _state(split, table, phrasings, *numbers)

    statements = []
    for entity, attribute in facts:
        drawn = int(generator.integers(num_trained[attribute]))
        if entity in unseen:
            statements.append(state("unseen-entities", entity, attribute, drawn))
            continue
        is_held_out = (entity, attribute) in held_out
        for phrasing in range(num_trained[attribute]):
            split: SplitName = "validation" if is_held_out and phrasing == drawn else "train"
            statements.append(state(split, entity, attribute, phrasing))
        if is_held_out:
            statements.append(state("unseen-phrasing", entity, attribute, num_trained[attribute]))
    return [statements[number] for number in generator.permutation(len(statements))]


def _facts_of(table: FactTable) -> list[tuple[int, int]]:
    """Return the number of the entity and of the attribute of each fact."""
    return [
        (entity, attribute)
        for entity, values in enumerate(table.entities.values())
        for attribute, name in enumerate(table.attributes)
        if name in values
    ]


def _state(
    split: SplitName,
    table: FactTable,
    phrasings: Mapping[str, Sequence[Phrasing]],
    entity: int,
    attribute: int,
    phrasing: int,
) -> Statement:
    key, name = table.keys[entity], table.attributes[attribute]
    sentence = phrasings[name][phrasing]
    text = sentence.statement(key, table.entities[key][name])
    return Statement(split, entity, attribute, phrasing, sentence.question(key), text)


class FactStatements:
    """The statements of a table as the documents of a data set, with the files that say which fact each one states."""

    num_empty = 0

    def __init__(
        self,
        table: FactTable,
        phrasings: Mapping[str, Sequence[Phrasing]],
        *,
        seed: int,
        held_out_fraction: float | None,
    ) -> None:
        """Make the statements; arguments and errors are those of `make_statements`."""
        self.split_names = SPLIT_NAMES if held_out_fraction is None else FACT_SPLIT_NAMES
        self._statements = make_statements(table, phrasings, seed=seed, held_out_fraction=held_out_fraction)
        self._description = table.description
        self.facts = FactSet.of(table, phrasings)
        self.num_duplicates = table.num_duplicate_rows
        self.num_bytes = sum(len(statement.text.encode()) for statement in self._statements)

    def description(self) -> dict[str, str]:
        """Say where the facts come from, for the data set's index."""
        return self._description

    def texts(self) -> Iterator[tuple[SplitName, str]]:
        """Yield each statement's split and text."""
        for statement in self._statements:
            yield statement.split, statement.text

    def write(self, folder: Path, tokenizer: Tokenizer) -> dict[SplitName, FileRecord]:
        """Write which fact each document of each split states, and where its answer begins.

        The answer begins at the first token that the question alone does not have, so that no token before it holds
        a part of the value.
        """
        texts = tokenizer.encode_batch([statement.text for statement in self._statements])
        questions = tokenizer.encode_batch([statement.question for statement in self._statements])
        rows: dict[SplitName, list[tuple[int, int, int, int]]] = {name: [] for name in self.split_names}
        for statement, text, question in zip(self._statements, texts, questions, strict=True):
            start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, question, strict=False)))
            rows[statement.split].append((statement.entity, statement.attribute, statement.phrasing, start))
        return {name: write_split_facts(folder, name, rows[name]) for name in self.split_names}
