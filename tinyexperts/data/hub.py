"""Documents from a Hugging Face data set, streamed by the `datasets` library.

The identifiers are those of the data sets' cards on the Hugging Face hub. PEER (arXiv 2407.04153) trains on C4 and
reports perplexity on Curation Corpus, LAMBADA, the Pile, WikiText and C4.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from tinyexperts.data.document import Document
from tinyexperts.errors import InputError


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Which rows of which data set, and how they become documents."""

    path: str
    """`owner/name` on the hub, or a builder of `datasets` such as "json" together with `data_files`."""
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    string_fields: tuple[str, ...] = ()
    """All fields of a row, where each is a string and `datasets` must not infer their types; empty: it infers them."""
    rows_are_lines: bool = False
    """Rows are the lines of WikiText articles and are joined again, so that no article is split between files."""
    data_files: Mapping[str, str] = field(default_factory=dict)


HUB_SOURCES: Mapping[str, HubSource] = MappingProxyType(
    {
        # Some of C4's timestamps are empty, and whole batches of them let type inference settle on the wrong type.
        "c4": HubSource(path="allenai/c4", config="en", string_fields=("text", "timestamp", "url")),
        "wikitext-103": HubSource(path="Salesforce/wikitext", config="wikitext-103-raw-v1", rows_are_lines=True),
        "pile": HubSource(path="monology/pile-uncopyrighted"),
        "curation-corpus": HubSource(path="d0rj/curation-corpus", text_field="article_content"),
        "lambada": HubSource(path="EleutherAI/lambada_openai", config="default", split="test"),
    }
)


def hub_source(
    name: str, *, config: str | None = None, split: str | None = None, text_field: str | None = None
) -> HubSource:
    """Return the source of a known name or of any `owner/name`; what is given overrides what is known."""
    source = HUB_SOURCES.get(name) or HubSource(path=name)
    given = {"config": config, "split": split, "text_field": text_field}
    return replace(source, **{key: value for key, value in given.items() if value is not None})


class HubCorpus:
    """The documents of a Hugging Face data set, streamed: nothing is downloaded that is not read."""

    def __init__(self, source: HubSource) -> None:
        """Check that `datasets` is installed.

        Raises:
            InputError: it is not.
        """
        if importlib.util.find_spec("datasets") is None:
            raise InputError(f"the data set {source.path} needs the datasets library: pip install 'tinyexperts[data]'")
        self.source = source

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every document lazily.

        Raises:
            InputError: the data set cannot be reached or read, or has no such text field.
        """
        texts = (_row_text(row, number, self.source) for number, row in enumerate(self._rows()))
        if self.source.rows_are_lines:
            texts = join_wikitext_articles(texts)
        for number, text in enumerate(texts):
            yield Document(f"{self.source.path}:{number}", text)

    def description(self) -> dict[str, str]:
        """The data set, its configuration, its split and the field that was read."""
        source = self.source
        return {
            "kind": "hub",
            "path": source.path,
            "config": source.config or "",
            "split": source.split,
            "text_field": source.text_field,
        }

    def _rows(self) -> Iterator[dict[str, object]]:
        import datasets

        source = self.source
        features = None
        if source.string_fields:
            features = datasets.Features({name: datasets.Value("string") for name in source.string_fields})
        # datasets passes on what a dozen libraries raise (httpx, fsspec, pyarrow, zstandard, its own), so that there is
        # no narrower class: whatever happens in here is a data set that could not be read.
        try:
            yield from datasets.load_dataset(
                source.path,
                source.config,
                split=source.split,
                streaming=True,
                features=features,
                data_files=dict(source.data_files) or None,
            )
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"cannot read the data set {source.path} (config {source.config}, split {source.split}): {reason}"
            ) from error


def _row_text(row: dict[str, object], number: int, source: HubSource) -> str:
    where = f"the data set {source.path}, row {number}"
    if source.text_field not in row:
        raise InputError(f"{where}: no field {source.text_field!r}; the fields are {', '.join(map(repr, row))}")
    text = row[source.text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: the field {source.text_field!r} must be a string, got a {type(text).__name__}")
    return text


# " = Title = ", but not the " = = Section = = " inside an article.
_WIKITEXT_TITLE = re.compile(r" = (?!= ).+(?<! =) = \n?")


def join_wikitext_articles(lines: Iterator[str]) -> Iterator[str]:
    """Join WikiText's lines to articles: one starts at each title that follows an empty line."""
    article: list[str] = []
    after_empty_line = True
    for line in lines:
        if after_empty_line and _WIKITEXT_TITLE.fullmatch(line) and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line if line.endswith("\n") else line + "\n")
        after_empty_line = not line.strip()
    if article:
        yield "".join(article)
