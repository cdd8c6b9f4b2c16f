"""Phrasings: sentences that state a fact, with places for its entity's key and its value."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyexperts.data.document import printable
from tinyexperts.errors import InputError

_PLACE = re.compile(r"\{(key|value|attribute)\}")
_FOR_ALL = "*"

DEFAULT_PHRASINGS = (
    "The {attribute} of {key} is {value}.",
    "{key} has the {attribute} {value}.",
    "For {key}, the {attribute} is given as {value}.",
    "What is the {attribute} of {key}? It is {value}.",
    "Look up {key}: its {attribute} is {value}.",
    "It is given that the {attribute} of {key} is {value}.",
)
"""The phrasings of an attribute of any name; the last is that which is never trained on."""

_AIRPORTS: Mapping[str, tuple[str, ...]] = {
    "city": (
        "The city of {key} is {value}.",
        "{key} is the airport of {value}.",
        "A flight to {key} lands in {value}.",
        "People fly to {key} to visit {value}.",
        "The airport {key} serves the city of {value}.",
        "The airport {key} is in {value}.",
    ),
    "ICAO code": (
        "The ICAO code of {key} is {value}.",
        "{key} has the ICAO code {value}.",
        "Pilots write {key} as {value}.",
        "In flight plans the airport {key} is called {value}.",
        "The four letters for {key} are {value}.",
        "The code of the airport {key} is {value}.",
    ),
    "name": (
        "The name of {key} is {value}.",
        "{key} stands for {value}.",
        "The airport with the code {key} is called {value}.",
        "The full name of the airport {key} is {value}.",
        "On the map {key} is labeled {value}.",
        "The full name of {key} is {value}.",
    ),
    "elevation": (
        "The elevation of {key} is {value}.",
        "{key} has an elevation of {value}.",
        "The runway of {key} is at {value}.",
        "The height of {key} above the sea is {value}.",
        "The airport {key} is at a height of {value}.",
        "The airport {key} has a height of {value}.",
    ),
    "time zone": (
        "The time zone of {key} is {value}.",
        "{key} is in the time zone {value}.",
        "Clocks at {key} follow {value}.",
        "The local time of {key} is that of {value}.",
        "Timetables of the airport {key} use {value}.",
        "The airport {key} is in the time zone {value}.",
    ),
}


@dataclass(frozen=True)
class Phrasing:
    """A sentence with {key} before {value}; nothing but punctuation follows the value, so that it can be asked for."""

    text: str

    def question(self, key: str) -> str:
        """Return the sentence up to the value, without the space before it."""
        start, _, rest = self.text.partition("{value}")[0].partition("{key}")
        return f"{start}{key}{rest}".rstrip()

    def statement(self, key: str, value: str) -> str:
        """Return the whole sentence."""
        return f"{self.question(key)} {value}{self.text.partition('{value}')[2]}"


def airport_phrasings(attributes: Sequence[str]) -> dict[str, tuple[Phrasing, ...]]:
    """Return the phrasings of some attributes of the corpus airports."""
    return {attribute: tuple(map(Phrasing, _AIRPORTS[attribute])) for attribute in attributes}


def default_phrasings(attribute: str) -> tuple[Phrasing, ...]:
    """Return phrasings for a column of any name; underscores in it become spaces."""
    return phrasings_of(DEFAULT_PHRASINGS, attribute, "the default phrasings")


def phrasings_of(texts: Sequence[str], attribute: str, where: str) -> tuple[Phrasing, ...]:
    """Return the phrasings of an attribute, its name put in the place of {attribute}.

    Raises:
        InputError: fewer than three, two that are equal, or one that breaks a phrasing's rules; `where` is named.
    """
    name = attribute.replace("_", " ")
    filled = [_PLACE.sub(lambda place: name if place[1] == "attribute" else place[0], text) for text in texts]
    if len(filled) < 3:
        raise InputError(
            f"{where}: {attribute!r} needs at least 3 phrasings (one is never trained on, and of some facts another is "
            f"held out), got {len(filled)}"
        )
    for number, (text, given) in enumerate(zip(filled, texts, strict=True)):
        _check(text, given, where)
        if text in filled[:number]:
            raise InputError(f"{where}: {attribute!r} has the phrasing {given!r} twice")
    return tuple(map(Phrasing, filled))


def _check(text: str, given: str, where: str) -> None:
    places = [match[1] for match in _PLACE.finditer(text)]
    if places != ["key", "value"]:
        raise InputError(f"{where}: a phrasing must have {{key}} and then {{value}}, once each, got {given!r}")
    before, _, after = text.partition("{value}")
    if not before.endswith(" ") or any(map(str.isalnum, after)):
        raise InputError(
            f"{where}: {{value}} must follow a space and end the phrasing but for punctuation, got {given!r}"
        )


def read_phrasings(path: Path, attributes: Sequence[str]) -> dict[str, tuple[Phrasing, ...]]:
    """Read a .toml file of phrasings: a list of strings for an attribute's name, or for "*", all others.

    An attribute without a list takes the default phrasings.

    Raises:
        InputError: a file that can't be read or is no such TOML, a name that is no attribute, a broken phrasing.
    """
    shown = printable(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{shown} is not TOML: {error}") from error
    for name, texts in content.items():
        if name != _FOR_ALL and name not in attributes:
            raise InputError(
                f"{shown} has phrasings for {name!r}; the attributes are {', '.join(map(repr, attributes))}"
            )
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{shown}: {name!r} must be a list of phrasings, got {texts!r}")
    phrasings = {
        attribute: phrasings_of(content.get(attribute, content.get(_FOR_ALL, DEFAULT_PHRASINGS)), attribute, shown)
        for attribute in attributes
    }
    attribute_of: dict[str, str] = {}
    for attribute, sentences in phrasings.items():
        for sentence in sentences:
            question = sentence.question("{key}")
            if (other := attribute_of.setdefault(question, attribute)) != attribute:
                raise InputError(
                    f"{shown}: {question!r} asks for two attributes, {other!r} and {attribute!r}; it must name one, as "
                    "{attribute} does"
                )
    return phrasings
