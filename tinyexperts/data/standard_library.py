"""The corpus that every machine has: the running Python's standard library."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tinyexperts.data.document import Document, printable
from tinyexperts.data.files import read_files
from tinyexperts.data.folders import walk_files
from tinyexperts.errors import InputError

# The tests go: they are three times the library and mostly tables of cases. The site packages are not the library.
_EXCLUDED_FOLDERS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


class StandardLibraryCorpus:
    """The .py files of the running Python's standard library without its tests: real text without a download."""

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every module in the order of the sorted paths.

        Raises:
            InputError: this Python carries no source files of its library, or one that cannot be read.
        """
        folder = Path(sysconfig.get_path("stdlib"))
        if not folder.is_dir():
            raise InputError(f"this Python has no folder with its standard library: {printable(folder)}")
        modules = (path for path in walk_files(folder, _EXCLUDED_FOLDERS) if path.suffix == ".py")
        yield from read_files(modules, folder, skipped)

    def description(self) -> dict[str, str]:
        """Return the version of Python, which decides the text."""
        return {"kind": "stdlib", "python": platform.python_version()}
