"""Corpora by name: the running Python's standard library, and the data sets of the Hugging Face hub."""

from __future__ import annotations

import difflib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tinyexperts.data.document import Corpus, Document, printable
from tinyexperts.data.file_formats import NotTextError, read_file
from tinyexperts.data.folders import walk_files
from tinyexperts.data.hub import HUB_SOURCES, HubCorpus, hub_source
from tinyexperts.errors import InputError

STANDARD_LIBRARY = "stdlib"

# The tests go: they are three times the library and mostly tables of cases. The site packages are not the library.
_EXCLUDED_FOLDERS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


class StandardLibraryCorpus:
    """The .py files of the running Python's standard library without its tests: real text without a download."""

    def __init__(self) -> None:
        self.folder = Path(sysconfig.get_path("stdlib"))

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every module in the order of the sorted paths.

        Raises:
            InputError: this Python carries no source files of its library, or one that cannot be read.
        """
        if not self.folder.is_dir():
            raise InputError(f"this Python has no folder with its standard library: {printable(self.folder)}")
        for path in walk_files(self.folder, _EXCLUDED_FOLDERS):
            if path.suffix == ".py":
                try:
                    yield from read_file(path, printable(path.relative_to(self.folder)))
                except NotTextError as error:
                    skipped.append(str(error))

    def description(self) -> dict[str, str]:
        """The version of Python, which decides the text."""
        return {"kind": STANDARD_LIBRARY, "python": platform.python_version()}


def open_corpus(
    name: str,
    *,
    text_field: str | None = None,
    hub_config: str | None = None,
    hub_split: str | None = None,
) -> Corpus:
    """Return the corpus of a name: "stdlib", one of `HUB_SOURCES`, or any `owner/name` of the Hugging Face hub.

    Raises:
        InputError: an unknown name, or an option that this corpus does not have.
    """
    if name == STANDARD_LIBRARY:
        given = {"text_field": text_field, "hub_config": hub_config, "hub_split": hub_split}
        for option, value in given.items():
            if value is not None:
                raise InputError(f"{option} is for data sets, and the corpus {STANDARD_LIBRARY!r} has none: {value!r}")
        return StandardLibraryCorpus()
    owner, _, rest = name.partition("/")
    if name not in HUB_SOURCES and not (owner and rest and "/" not in rest):
        raise InputError(_unknown_corpus(name))
    return HubCorpus(hub_source(name, config=hub_config, split=hub_split, text_field=text_field))


def _unknown_corpus(name: str) -> str:
    names = [STANDARD_LIBRARY, *HUB_SOURCES]
    if Path(name).exists():
        return f"unknown corpus {name!r}; it is a path: give it as --files {printable(name)}"
    close = difflib.get_close_matches(name.lower(), names)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the names are {', '.join(names)}"
    return f"unknown corpus {name!r}; {hint} (a Hugging Face data set is written owner/name)"
