"""The documents of one file; its name says how it is read, whatever the case of its letters.

.jsonl .ndjson .jsonlines .ldjson   one JSON object a line, each a document
.json                               the same where its first line is a whole object and another line follows, or where
                                    its only line has the text field; the elements of an array whose first is an object
                                    with the text field; else one text, as the settings of a program are, unless it
                                    names the text field and is broken
.csv .tsv                           each row where the first row, the header, names the text field (columns may be set
                                    apart by commas, semicolons or tabs); else one text, as tables of numbers are
.parquet                            each row
anything else                       one text in UTF-8

All but .parquet may also be compressed: .gz, .bz2, .xz. Archives, other compressions, binary content and what is no
regular file raise `NotTextError`.
"""

from __future__ import annotations

import codecs
import csv
import errno
import importlib
import importlib.util
import io
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import IO

from tinyexperts.data.document import Document, printable
from tinyexperts.errors import InputError

_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
_CSV_DELIMITERS = ",;\t"
_MOST_CHARACTERS = 2**31 - 1
_MODULE_OF_COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
_OTHER_COMPRESSIONS = (".zst", ".zstd", ".lz4", ".lzma", ".lz")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar", ".whl", ".jar")


class NotTextError(InputError):
    """The refusal of a file that should hold text and holds something else, or is packed in a way that isn't read."""


def read_file(path: Path, name: str, *, text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of one file.

    Args:
        path (Path): the file.
        name (str): the start of the documents' names.
        text_field (str): the field or column that holds the text, in files with records.

    Raises:
        NotTextError: an archive, an unknown compression, a pipe, a link that leads nowhere; a file that should be text
            holds a zero byte or bytes that are not UTF-8; a broken .json.
        InputError: a file that cannot be read, a broken line or element, a missing field.
    """
    shown = printable(path)
    lower_name = path.name.lower()
    compression = next((suffix for suffix in _MODULE_OF_COMPRESSION if lower_name.endswith(suffix)), "")
    kind = lower_name.removesuffix(compression)
    _refuse_what_is_packed(shown, lower_name, kind)
    opener = _opener(compression, shown)
    not_whole = f"{shown} is not a whole {_MODULE_OF_COMPRESSION.get(compression)} file"
    try:
        _refuse_what_is_no_file(path, shown)
        if kind.endswith(".parquet"):
            yield from _read_parquet(path, shown, name, text_field)
            return
        with path.open("rb") as packed, opener.open(packed) if opener else packed as file:
            if kind.endswith(_JSON_LINES_SUFFIXES):
                yield from _read_json_lines(file, shown, name, text_field)
            elif kind.endswith(".json"):
                yield from _read_json(file, shown, name, text_field)
            elif kind.endswith((".csv", ".tsv")):
                yield from _read_csv(_decoded(file.read(), shown), shown, name, text_field)
            else:
                yield Document(name, _decoded(file.read(), shown))
    except (EOFError, zlib.error, getattr(opener, "LZMAError", EOFError)) as error:
        raise InputError(f"{not_whole}: {error}") from error
    except OSError as error:
        # gzip and bz2 report damage by an OSError that is none of the system's.
        sentence = not_whole if opener and error.errno is None else f"cannot read {shown}"
        raise InputError(f"{sentence}: {error.strerror or error}") from error


def _opener(compression: str, shown: str) -> ModuleType | None:
    """Return the module of the standard library that unpacks this; some builds of Python lack one."""
    if not compression:
        return None
    try:
        return importlib.import_module(_MODULE_OF_COMPRESSION[compression])
    except ImportError as error:
        raise InputError(f"{shown} can't be read by this Python, which was built without {error.name}") from error


def _refuse_what_is_packed(shown: str, lower_name: str, kind: str) -> None:
    for suffix in _ARCHIVES:
        if kind.endswith(suffix):
            raise NotTextError(f"{shown} is an archive ({suffix}), which isn't read: unpack it and give its files")
    for suffix in _OTHER_COMPRESSIONS:
        if kind.endswith(suffix):
            raise NotTextError(
                f"{shown} is compressed in a way that isn't read ({suffix}): unpack it, or pack it as .gz, .bz2 or .xz"
            )
    if kind != lower_name and kind.endswith((*_MODULE_OF_COMPRESSION, ".parquet")):
        raise NotTextError(f"{shown} is packed twice, which isn't read: unpack it once")


def _refuse_what_is_no_file(path: Path, shown: str) -> None:
    """Refuse pipes and sockets, which would block for ever and could not be read a second time, and the like."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise NotTextError(f"{shown} is a link that leads nowhere") from error
        raise
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))
        kind = next((kind for is_kind, kind in kinds if is_kind(mode)), "a device")
        raise NotTextError(f"{shown} is {kind}, which isn't read: give a file that holds the text")


def _decoded(content: bytes, shown: str) -> str:
    zero_at = content.find(b"\0")
    if zero_at >= 0:
        raise NotTextError(f"{shown} is binary, not text: a zero byte at offset {zero_at}")
    mark_bytes = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        return content[mark_bytes:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + mark_bytes
        raise NotTextError(f"{shown} is not UTF-8 text: the byte at offset {offset} cannot be decoded") from error


def _read_json_lines(lines: Iterable[bytes], shown: str, name: str, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{shown}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not a JSON object: {error}") from error
        yield Document(f"{name}:{number}", text_of_record(record, text_field, where))


def _read_json(file: IO[bytes], shown: str, name: str, text_field: str) -> Iterator[Document]:
    """Look at the first lines, and read the file once, whatever it turns out to be."""
    first_lines: list[bytes] = []
    first = None
    for line in file:
        first_lines.append(line)
        content = line.removeprefix(codecs.BOM_UTF8).strip()
        if not content:
            continue
        first = _json_or_none(content) if content.startswith(b"{") else None
        if first != {}:  # an object without fields holds no document and does not show what follows
            break
    if isinstance(first, dict) and first:
        for line in file:
            first_lines.append(line)
            if line.strip():
                break
        else:
            line = b""
        if line or text_field in first:
            yield from _read_json_lines(chain(first_lines, file), shown, name, text_field)
            return
    text = _decoded(b"".join(first_lines) + file.read(), shown)
    elements = _json_or_none(text) if text.lstrip().startswith("[") else None
    if isinstance(elements, list) and elements and isinstance(elements[0], dict) and text_field in elements[0]:
        for number, element in enumerate(elements):
            yield Document(f"{name}:{number}", text_of_record(element, text_field, f"{shown}, element {number}"))
        return
    _refuse_broken_records(text, shown, text_field)
    yield Document(name, text)


def _refuse_broken_records(text: str, shown: str, text_field: str) -> None:
    """Refuse text that names the text field and is no JSON: it was to be records, and no settings with comments."""
    if text.lstrip().startswith(("{", "[")) and f'"{text_field}"' in text:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise NotTextError(f"{shown} has the field {text_field!r} and is not JSON: {error}") from error


def _json_or_none(content: str | bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def text_of_record(record: object, text_field: str, where: str) -> str:
    """Return the text of a row or of a JSON object; a null is an empty text.

    Args:
        record (object): the row, a dictionary by fields.
        text_field (str): the field that holds the text.
        where (str): the row's place in the error.

    Raises:
        InputError: no such field, or something else in it than valid text.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object but a {type(record).__name__}")
    if text_field not in record:
        raise InputError(f"{where}: no field {text_field!r}; the fields are {', '.join(map(repr, record))}")
    return _checked_text(record[text_field], text_field, where)


def _checked_text(value: object, text_field: str, where: str) -> str:
    """Return the text of a field; a null is an empty document, as data sets write a text that they lost."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {text_field!r} must be a string, got a {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the field {text_field!r} is not valid Unicode: {error.reason}") from error
    return value


def _read_csv(text: str, shown: str, name: str, text_field: str) -> Iterator[Document]:
    for delimiter in _CSV_DELIMITERS:
        header = _csv_header(text, delimiter)
        if text_field in header:
            break
    else:
        yield Document(name, text)
        return
    column = header.index(text_field)
    for number, row in enumerate(_csv_records(text, delimiter, header, shown)):
        yield Document(f"{name}:{number}", row[column])


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read a .csv or .tsv file whole: its header, and its rows, each as long as the header.

    Columns are set apart by commas, semicolons or tabs: by what gives the header the most columns.

    Raises:
        InputError: a file that can't be read or is no text in UTF-8, a row of another length, a column's name that
            repeats, no header.
    """
    shown = printable(path)
    try:
        text = _decoded(path.read_bytes(), shown)
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror or error}") from error
    delimiter = max(_CSV_DELIMITERS, key=lambda delimiter: len(_csv_header(text, delimiter)))
    header = _csv_header(text, delimiter)
    if not header:
        raise InputError(f"{shown} has no header, the row with the names of the columns")
    for number, name in enumerate(header):
        if name in header[:number]:
            raise InputError(f"{shown} has two columns with the name {name!r}")
    return header, list(_csv_records(text, delimiter, header, shown))


def _csv_records(text: str, delimiter: str, header: list[str], shown: str) -> Iterator[list[str]]:
    """Yield the rows after the header, each as long as it."""
    number = -1
    try:
        for number, row in enumerate(_csv_rows(text, delimiter), start=-1):
            if len(row) != len(header):
                raise InputError(f"{shown}, row {number}: {len(row)} columns, and the header has {len(header)}")
            if number >= 0:
                yield row
    except csv.Error as error:
        raise InputError(f"{shown}, row {number + 1}: not a row of a table: {error}") from error


def _csv_header(text: str, delimiter: str) -> list[str]:
    try:
        return [column.strip() for column in next(_csv_rows(text, delimiter), [])]
    except csv.Error:  # a text with quotation marks, not a table
        return []


def _csv_rows(text: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows but blank lines; the limit on a field's length, the whole process's, is lifted for each alone."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        limit = csv.field_size_limit(_MOST_CHARACTERS)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield row


def _read_parquet(path: Path, shown: str, name: str, text_field: str) -> Iterator[Document]:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{shown} needs pyarrow to be read: pip install 'tinyexperts[data]'")
    import pyarrow  # type: ignore[import-untyped]  # it has no types
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        # Opened here, as pyarrow refuses paths that are not UTF-8.
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                columns_list = ", ".join(map(repr, columns))
                raise InputError(f"{shown}: no column {text_field!r}; the columns are {columns_list}")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    yield Document(f"{name}:{row}", _checked_text(value.as_py(), text_field, f"{shown}, row {row}"))
                    row += 1
    except pyarrow.ArrowException as error:
        raise InputError(f"{shown} is not a readable parquet file: {error}") from error
