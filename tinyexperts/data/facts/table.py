"""Tables of facts: entities by their key, and the values of their attributes."""

from __future__ import annotations

import importlib.resources
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tinyexperts.data.document import printable
from tinyexperts.data.file_formats import read_table
from tinyexperts.errors import InputError
from tinyexperts.extras import require_extra

AIRPORTS = "airports"
"""The name of the corpus of airports."""
_AIRPORT_ATTRIBUTES = ("city", "ICAO code", "name", "elevation", "time zone")
_METERS_PER_FOOT = 0.3048
_NAMED_AT_MOST = 5


@dataclass(frozen=True, kw_only=True)
class FactTable:
    """Entities, and what is known of each."""

    description: dict[str, str]
    """The table's source, for the index of a data set."""
    attributes: tuple[str, ...]
    """The attributes, in the order of the table's columns."""
    entities: Mapping[str, Mapping[str, str]]
    """The values of an entity by attribute, by the entity's key; an attribute without a value is not there."""
    num_duplicate_rows: int = 0
    """Rows that repeat an earlier one."""
    num_rows_without_key: int = 0
    """Rows whose key is empty; they are left out."""

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of the entities."""
        return tuple(self.entities)

    @property
    def num_facts(self) -> int:
        """The number of values of all entities."""
        return sum(map(len, self.entities.values()))

    def without(self, keys: Collection[str]) -> FactTable:
        """Return the table without some entities.

        Raises:
            InputError: none would be left.
        """
        entities = {key: values for key, values in self.entities.items() if key not in keys}
        if not entities:
            raise InputError(f"exclude must leave an entity, and all {len(self.entities):,} are excluded")
        return replace(self, entities=entities)

    def sample(self, num_entities: int, *, seed: int) -> FactTable:
        """Return the table of some entities, drawn by the seed; those of a smaller number are among those of a larger.

        Raises:
            InputError: more entities than there are.
        """
        keys = list(self.entities)
        if num_entities > len(keys):
            raise InputError(
                f"max_entities must be at most {len(keys)}, the entities that there are, got {num_entities}"
            )
        chosen = np.random.default_rng(seed).permutation(len(keys))[:num_entities]
        return replace(self, entities={keys[number]: self.entities[keys[number]] for number in sorted(chosen)})


def read_fact_table(path: Path, *, key: str, attributes: Sequence[str] = ()) -> FactTable:
    """Read a table of facts: a .csv or .tsv file with a header, an entity in each row.

    White space around a cell is cut off, and within it made one space.

    Args:
        path (Path): the file.
        key (str): the column whose values name the entities.
        attributes (Sequence[str]): the columns to take; none: all others.

    Raises:
        InputError: a file that can't be read, a missing column, a key that repeats with other values, an attribute
            without values, no facts.
    """
    header, rows = read_table(path)
    shown = printable(path)
    for column in (key, *attributes):
        if column not in header:
            raise InputError(f"{shown} has no column {column!r}; its columns are {', '.join(map(repr, header))}")
    chosen = tuple(attributes) or tuple(column for column in header if column != key)
    if key in chosen:
        raise InputError(f"the key {key!r} can't be an attribute too: its value would be in the question")
    records = (dict(zip(header, row, strict=True)) for row in rows)
    description = {"kind": "facts", "table": shown, "key": key, "attributes": " ".join(chosen)}
    return _table(records, key=key, attributes=chosen, description=description, shown=shown)


def airports(attributes: Sequence[str] = ()) -> FactTable:
    """Return the airports that have an IATA code, of the package airportsdata (MIT license).

    Args:
        attributes (Sequence[str]): some of city, ICAO code, name, elevation (meters) and time zone; none: all of them.

    Raises:
        InputError: an attribute that they do not have.
        MissingExtra: the package is not installed.
    """
    if unknown := [attribute for attribute in attributes if attribute not in _AIRPORT_ATTRIBUTES]:
        raise InputError(f"the attributes of airports are {', '.join(_AIRPORT_ATTRIBUTES)}, got {unknown[0]!r}")
    require_extra("study", "the corpus airports")
    import airportsdata

    content = importlib.resources.files(airportsdata).joinpath("airports.csv")
    with importlib.resources.as_file(content) as path:
        header, rows = read_table(path)
    columns = {"name": "name", "city": "city", "icao": "ICAO code", "tz": "time zone"}
    records = []
    for row in rows:
        airport = dict(zip(header, row, strict=True))
        if airport["iata"]:
            elevation = {"elevation": f"{round(float(airport['elevation']) * _METERS_PER_FOOT)} m"}
            records.append(
                {"key": airport["iata"]} | {ours: airport[theirs] for theirs, ours in columns.items()} | elevation
            )
    description = {"kind": "facts", "table": "airportsdata", "version": airportsdata.__version__, "key": "iata"}
    if attributes:
        description["attributes"] = ", ".join(attributes)
    chosen = tuple(attributes) or _AIRPORT_ATTRIBUTES
    return _table(records, key="key", attributes=chosen, description=description, shown="airportsdata")


def _table(
    records: Iterable[Mapping[str, str]],
    *,
    key: str,
    attributes: tuple[str, ...],
    description: dict[str, str],
    shown: str,
) -> FactTable:
    entities: dict[str, dict[str, str]] = {}
    contradicted: dict[str, None] = {}
    num_duplicates = num_without_key = 0
    for record in records:
        cells = {attribute: _one_line(record[attribute]) for attribute in attributes}
        values = {attribute: value for attribute, value in cells.items() if value}
        name = _one_line(record[key])
        if not name:
            num_without_key += 1
            continue
        if name in entities:
            if entities[name] == values:
                num_duplicates += 1
            else:
                contradicted[name] = None
            continue
        entities[name] = values
    if contradicted:
        names = ", ".join(map(repr, list(contradicted)[:_NAMED_AT_MOST]))
        more = f" and {len(contradicted) - _NAMED_AT_MOST} more" if len(contradicted) > _NAMED_AT_MOST else ""
        raise InputError(f"{shown}: a key must name one entity, and rows of the same key differ: {names}{more}")
    for attribute in attributes:
        if entities and not any(attribute in values for values in entities.values()):
            raise InputError(
                f"{shown}: the column {attribute!r} has no values; leave it out by naming the --attributes"
            )
    if not any(entities.values()):
        raise InputError(f"{shown} has no facts: no row has a key and a value")
    return FactTable(
        description=description,
        attributes=attributes,
        entities=entities,
        num_duplicate_rows=num_duplicates,
        num_rows_without_key=num_without_key,
    )


def _one_line(cell: str) -> str:
    return " ".join(cell.split())
