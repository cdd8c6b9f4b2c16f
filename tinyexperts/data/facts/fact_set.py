"""The facts of a data set: facts.json, and for each split the fact that each of its documents states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tinyexperts.data.document import printable
from tinyexperts.data.facts.phrasings import Phrasing, default_phrasings
from tinyexperts.data.facts.table import FactTable
from tinyexperts.data.shards.index import FileRecord, SplitName
from tinyexperts.errors import InputError
from tinyexperts.files import sha256_of_file

FACTS_FILE = "facts.json"


class FactSet(BaseModel):
    """The table of facts and the phrasings that a data set was made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entities: dict[str, dict[str, str]]
    """The values of an entity by attribute, by its key."""
    phrasings: dict[str, tuple[str, ...]]
    """The phrasings of each attribute; the last is in no training statement."""
    num_duplicate_rows: int
    num_rows_without_key: int

    def __str__(self) -> str:
        num_facts = {name: self.value_counts(name).total() for name in self.attributes}
        counts = ", ".join(f"{number:,} of {name}" for name, number in num_facts.items())
        num_empty_cells = len(self.entities) * len(num_facts) - sum(num_facts.values())
        return (
            f"{len(self.entities):,} entities with facts: {counts}; {num_empty_cells:,} empty cells, "
            f"{self.num_duplicate_rows:,} rows that repeat one, {self.num_rows_without_key:,} rows without a key"
        )

    @classmethod
    def of(cls, table: FactTable, phrasings: Mapping[str, Sequence[Phrasing]]) -> FactSet:
        """Return the fact set of a table."""
        return cls(
            entities={key: dict(values) for key, values in table.entities.items()},
            phrasings={name: tuple(phrasing.text for phrasing in phrasings[name]) for name in table.attributes},
            num_duplicate_rows=table.num_duplicate_rows,
            num_rows_without_key=table.num_rows_without_key,
        )

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of the attributes."""
        return tuple(self.phrasings)

    def phrasings_for(self, attributes: Sequence[str]) -> dict[str, tuple[Phrasing, ...]]:
        """Return the phrasings of some attributes, the default ones of those that are not among the facts."""
        return {
            name: tuple(map(Phrasing, self.phrasings[name])) if name in self.phrasings else default_phrasings(name)
            for name in attributes
        }

    def value_counts(self, attribute: str) -> Counter[str]:
        """Count the entities that have each value of an attribute."""
        return Counter(values[attribute] for values in self.entities.values() if attribute in values)

    def write(self, folder: Path) -> FileRecord:
        """Write facts.json."""
        path = folder / FACTS_FILE
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return FileRecord(file=path.name, sha256=sha256_of_file(path))


@dataclass(frozen=True)
class SplitFacts:
    """The facts that the documents of a split state."""

    fact_set: FactSet
    rows: np.ndarray
    """For each document the numbers of its entity, attribute and phrasing, and the place of the answer's first token in
    it (int32 [num_documents, 4])."""

    @property
    def attribute_numbers(self) -> np.ndarray:
        """The number of each document's attribute (int32 [num_documents])."""
        return self.rows[:, 1]

    @property
    def answer_starts(self) -> np.ndarray:
        """The place of the first token of each document's answer (int32 [num_documents])."""
        return self.rows[:, 3]


def read_fact_set(path: Path) -> FactSet:
    """Read facts.json.

    Raises:
        InputError: the file is missing or damaged.
    """
    shown = printable(path)
    try:
        return FactSet.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the data set is incomplete: cannot read {shown}: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{shown} is damaged: {str(error).splitlines()[0]}") from error


def write_split_facts(folder: Path, split: SplitName, rows: Sequence[tuple[int, int, int, int]]) -> FileRecord:
    """Write the facts of a split's documents, in their order: entity, attribute, phrasing, start of the answer."""
    path = folder / f"{split}-facts.npy"
    np.save(path, np.array(rows, dtype="<i4").reshape(-1, 4), allow_pickle=False)
    return FileRecord(file=path.name, sha256=sha256_of_file(path))
