"""Documents from files and folders: plain text, source code, .jsonl, .parquet, and .gz of text and jsonl.

How a file is read goes by its name: `.jsonl`, `.jsonl.gz` and `.json.gz` (as C4 ships) hold one JSON object a line and
each is a document; each row of `.parquet` is a document; everything else is one document of UTF-8 text, `.json` too.
"""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tinyexperts.data.document import Document
from tinyexperts.errors import InputError

JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")


class FileCorpus:
    """The documents of files and folders, folders in the order of their sorted paths.

    In folders, hidden entries and `__pycache__` are passed over, and files whose content is binary are reported as
    skipped; a binary file that is named itself is an error.
    """

    def __init__(self, paths: Collection[Path], *, text_field: str = "text") -> None:
        """Check that every path exists.

        Raises:
            InputError: no path, or one that does not exist.
        """
        if not paths:
            raise InputError("no files given: name at least one file or folder")
        self.paths = tuple(Path(path) for path in paths)
        self.text_field = text_field
        for path in self.paths:
            if not path.exists():
                raise InputError(f"no such file or folder: {path}")

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every document lazily.

        Raises:
            InputError: a file that cannot be read, a broken line or a missing field (with file and line number), a
                binary file that was named itself (with the byte offset).
        """
        for path in self.paths:
            if not path.is_dir():
                yield from read_file(path, path.as_posix(), text_field=self.text_field)
                continue
            for file in walk_files(path):
                name = file.relative_to(path).as_posix()
                try:
                    yield from read_file(file, name, text_field=self.text_field)
                except BinaryFileError as error:
                    skipped.append(str(error))

    def description(self) -> dict[str, str]:
        """The paths as they were given and the field that was read."""
        paths = " ".join(path.as_posix() for path in self.paths)
        return {"kind": "files", "paths": paths, "text_field": self.text_field}


class BinaryFileError(InputError):
    """A file that was expected to hold UTF-8 text holds something else."""


def skipped_note(skipped: Sequence[str]) -> str:
    """What to add to a sentence about files of which some were left out."""
    return f"; {len(skipped):,} binary files were left out (the first: {skipped[0]})" if skipped else ""


def walk_files(folder: Path, excluded_folders: Collection[str] = ("__pycache__",)) -> Iterator[Path]:
    """Yield the regular files below a folder, sorted, without hidden entries and the folders of the given names.

    Raises:
        InputError: a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"cannot list the folder {error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in excluded_folders)
        for name in sorted(files):
            path = Path(parent, name)
            # Pipes and sockets would block for ever, and links that lead nowhere hold nothing.
            if not name.startswith(".") and path.is_file():
                yield path


def read_file(path: Path, name: str, *, text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of one file; `name` is the start of their names.

    Raises:
        BinaryFileError: a file that should be text holds a zero byte or bytes that are not UTF-8.
        InputError: a file that cannot be read, a broken line, a missing field.
    """
    lower_name = path.name.lower()
    try:
        if lower_name.endswith(JSON_LINES_SUFFIXES):
            yield from _read_json_lines(path, name, text_field)
        elif lower_name.endswith(".parquet"):
            yield from _read_parquet(path, name, text_field)
        else:
            yield Document(name, _read_text(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _open_binary(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _read_text(path: Path) -> str:
    with _open_binary(path) as file:
        content = file.read()
    zero_at = content.find(b"\0")
    if zero_at >= 0:
        raise BinaryFileError(f"{path} is binary, not text: a zero byte at offset {zero_at}")
    mark_bytes = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        return content[mark_bytes:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + mark_bytes
        raise BinaryFileError(f"{path} is not UTF-8 text: the byte at offset {offset} cannot be decoded") from error


def _read_json_lines(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with _open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: not a JSON object but a {type(record).__name__}")
            if text_field not in record:
                raise InputError(f"{where}: no field {text_field!r}; the fields are {', '.join(map(repr, record))}")
            yield Document(f"{name}:{number}", _checked_text(record[text_field], text_field, where))


def _checked_text(value: object, text_field: str, where: str) -> str:
    """The text of a field; a null counts as an empty document, as data sets write a text that they lost."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {text_field!r} must be a string, got a {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the field {text_field!r} is not valid Unicode: {error.reason}") from error
    return value


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path} needs pyarrow to be read: pip install 'tinyexperts[data]'")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                columns_list = ", ".join(map(repr, columns))
                raise InputError(f"{path}: no column {text_field!r}; the columns are {columns_list}")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    yield Document(f"{name}:{row}", _checked_text(value.as_py(), text_field, f"{path}, row {row}"))
                    row += 1
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error
