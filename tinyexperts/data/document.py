"""The named documents that every corpus yields."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
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


def has_text(text: str) -> bool:
    """Say whether a document holds more than white space; one that doesn't is left out wherever text is taken."""
    return bool(text) and not text.isspace()


def printable(path: str | Path) -> str:
    r"""Write a path with slashes; bytes of its name that are not UTF-8, which can't be printed or stored, as \xff."""
    text = path if isinstance(path, str) else path.as_posix()
    return os.fsencode(text).decode("utf-8", "backslashreplace")
