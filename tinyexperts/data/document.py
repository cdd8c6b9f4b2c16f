"""What every corpus yields: named documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Document:
    """One text that is never split between training and validation, with a name to find it again."""

    name: str
    text: str


class Corpus(Protocol):
    """A source of documents that can be read again and yields them in the same order each time."""

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every document lazily; for each file left out a sentence that says why is appended to `skipped`."""
        ...

    def description(self) -> dict[str, str]:
        """Say where the text comes from, for the data set's index."""
        ...
