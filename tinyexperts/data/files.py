"""Documents from files and folders: text, source code, JSON lines, tables (file_formats.py says what is read how)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tinyexperts.data.document import Document, printable
from tinyexperts.data.file_formats import NotTextError, read_file
from tinyexperts.data.folders import walk_files
from tinyexperts.errors import InputError

# One path or several, each as a string or otherwise.
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def paths_of(paths: Paths) -> tuple[Path, ...]:
    """Return one path, or several, as a tuple."""
    return (Path(paths),) if isinstance(paths, str | os.PathLike) else tuple(map(Path, paths))


def read_files(
    files: Iterable[Path], folder: Path, skipped: list[str], *, text_field: str = "text"
) -> Iterator[Document]:
    """Yield the documents of the files of a folder; a sentence for each file without text is appended to `skipped`."""
    for file in files:
        try:
            yield from read_file(file, printable(file.relative_to(folder)), text_field=text_field)
        except NotTextError as error:
            skipped.append(str(error))


class FileCorpus:
    """The documents of files and folders, folders in the order of their sorted paths.

    In folders, hidden entries and `__pycache__` are passed over, links to folders are followed, each folder being read
    once, and what holds no text (binary files, archives, pipes, links that lead nowhere) is reported as skipped; named
    itself it is an error.
    """

    def __init__(self, paths: Paths, *, text_field: str = "text") -> None:
        """Check that every path exists.

        Args:
            paths (Paths): one path or several, of files and folders.
            text_field (str): the field or column that holds the text, in files with records.

        Raises:
            InputError: no path, or one that does not exist.
        """
        self.paths = paths_of(paths)
        if not self.paths:
            raise InputError("no files given: name at least one file or folder")
        self.text_field = text_field
        for path in self.paths:
            try:
                is_missing = not path.exists()
            except OSError as error:
                raise InputError(f"cannot read {printable(path)}: {error.strerror}") from error
            if is_missing and path.is_symlink():
                raise InputError(f"{printable(path)} is a link that leads nowhere")
            if is_missing:
                raise InputError(f"no such file or folder: {printable(path)}")

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every document lazily.

        Raises:
            InputError: a file that cannot be read, a broken line or a missing field (with file and line number), a
                file without text that was named itself (with the reason).
        """
        for path in self.paths:
            if not path.is_dir():
                yield from read_file(path, printable(path), text_field=self.text_field)
                continue
            yield from read_files(walk_files(path), path, skipped, text_field=self.text_field)

    def description(self) -> dict[str, str]:
        """Return the paths as they were given and the field that was read."""
        paths = " ".join(map(printable, self.paths))
        return {"kind": "files", "paths": paths, "text_field": printable(self.text_field)}


def skipped_note(skipped: Sequence[str]) -> str:
    """Return the end of a sentence about files, which says how many were left out."""
    return f"; {len(skipped):,} files were left out (the first: {skipped[0]})" if skipped else ""
