"""Corpora brought by their names, checked against what was published, and kept as files of JSON lines.

<folder>/<name>.jsonl          a document a line, {"name": ..., "text": ...}, as `data prepare --files` reads it
<folder>/.<name>.source.json   where it came from, its license, and the file's checksum; hidden, since it is no text
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tinyexperts.data.corpora import NamedCorpus, corpus_to_fetch
from tinyexperts.data.document import Corpus, Document, printable
from tinyexperts.data.packages import PackageCorpus
from tinyexperts.errors import InputError
from tinyexperts.files import sha256_of_file


@dataclass(frozen=True, kw_only=True)
class FetchedCorpus:
    """A corpus on disk."""

    path: Path
    license: str
    sha256: str
    num_documents: int
    num_bytes: int
    new: bool
    """False if it was there already."""

    def __str__(self) -> str:
        there = "" if self.new else " (there already, checksum right)"
        return (
            f"{printable(self.path)}{there}: {self.num_documents:,} documents, {self.num_bytes:,} bytes of text\n"
            f"  license  {self.license}\n  sha256   {self.sha256}"
        )


def fetch_corpus(name: str, folder: Path, *, max_bytes: int, progress: Progress) -> FetchedCorpus:
    """Bring a corpus into the folder, or find that it is there; it appears as a whole or not at all.

    Args:
        name (str): a name that `corpus_to_fetch` knows.
        folder (Path): the folder of the file.
        max_bytes (int): limit on the text that is read of a data set of the hub; packages are taken as they are.
        progress (Progress): shows a bar for each download.

    Raises:
        InputError: an unknown name, no network, a checksum that differs, a file that is there already and has been
            changed, or was fetched from elsewhere or up to another limit.
    """
    entry = corpus_to_fetch(name)
    packages = entry.corpus.files if isinstance(entry.corpus, PackageCorpus) else ()
    origin = {
        "packages": [{"url": package.url, "sha256": package.sha256} for package in packages],
        "max_bytes": None if packages else max_bytes,
    }
    folder = Path(folder)
    path, record_path = folder / f"{name}.jsonl", folder / f".{name}.source.json"
    if path.exists():
        return _found(path, record_path, entry, origin)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        partial = Path(scratch, path.name)
        num_documents = num_bytes = 0
        with partial.open("wb") as file:
            for document in _documents(entry.corpus, max_bytes, progress):
                file.write(_line(document, entry))
                num_documents += 1
                num_bytes += len(document.text.encode())
        if not num_documents:
            limit = "" if packages else f", or its first is longer than {max_bytes:,} bytes: raise --max-mb"
            raise InputError(f"the corpus {name} came without a document ({entry.page}){limit}")
        record = {
            "description": entry.description,
            "license": entry.license,
            "page": entry.page,
            **origin,
            "sha256": sha256_of_file(partial),
            "num_documents": num_documents,
            "num_bytes": num_bytes,
        }
        record_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    return _fetched(path, entry, record, new=True)


def _line(document: Document, entry: NamedCorpus) -> bytes:
    try:
        return json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise InputError(f"{document.name} ({entry.page}) is not valid Unicode: {error.reason}") from error


def _fetched(path: Path, entry: NamedCorpus, record: dict[str, Any], *, new: bool) -> FetchedCorpus:
    sizes = {name: record[name] for name in ("sha256", "num_documents", "num_bytes")}
    return FetchedCorpus(path=path, license=entry.license, new=new, **sizes)


def _found(path: Path, record_path: Path, entry: NamedCorpus, origin: dict[str, Any]) -> FetchedCorpus:
    """Check that a file which is there already is the corpus, and has not been changed."""
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        fetched = _fetched(path, entry, record, new=False)
        before = {name: record[name] for name in origin}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{printable(path)} exists, and {printable(record_path)} does not say where from: move it away"
        ) from error
    differing = [f"{name} was {before[name]}, is {origin[name]}" for name in origin if before[name] != origin[name]]
    if differing:
        raise InputError(
            f"{printable(path)} was fetched otherwise ({'; '.join(differing)}): move it away to fetch it again"
        )
    if (found := sha256_of_file(path)) != fetched.sha256:
        raise InputError(
            f"{printable(path)} has been changed since it was fetched: its sha256 was {fetched.sha256}, is {found}"
        )
    return fetched


def _documents(corpus: Corpus, max_bytes: int, progress: Progress) -> Iterator[Document]:
    """Yield the documents of packages, or those of a data set of the hub up to the limit."""
    if isinstance(corpus, PackageCorpus):
        yield from corpus.documents([], progress)
        return
    task = progress.add_task(corpus.description()["path"], total=max_bytes)
    num_bytes = 0
    for document in corpus.documents([]):
        num_bytes += len(document.text.encode())
        if num_bytes > max_bytes:
            return
        progress.update(task, completed=num_bytes)
        yield document


def byte_progress() -> Progress:
    """Return bars that count bytes."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
