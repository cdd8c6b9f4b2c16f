"""Documents from a Hugging Face data set, streamed by the `datasets` library."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tinyexperts.data.document import Document
from tinyexperts.data.file_formats import text_of_record
from tinyexperts.errors import InputError


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """The documents of a Hugging Face data set, streamed: nothing is downloaded that is not read."""

    path: str
    """`owner/name` on the hub, or a builder of `datasets` such as "json" together with `data_files`."""
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    string_fields: tuple[str, ...] = ()
    """All fields of a row, where each is a string and `datasets` must not infer their types; empty: it infers them."""
    rows_are_lines: bool = False
    """True if rows are the lines of WikiText articles, which are joined again, so that no article is split."""
    data_files: Mapping[str, str] = field(default_factory=dict)
    """The files of each split, where a builder reads them."""

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        """Yield every document lazily.

        Raises:
            InputError: `datasets` is not installed, or the data set cannot be reached or read, or has no such text
                field.
        """
        if importlib.util.find_spec("datasets") is None:
            raise InputError(f"the data set {self.path} needs the datasets library: pip install 'tinyexperts[data]'")
        texts = (
            text_of_record(row, self.text_field, f"the data set {self.path}, row {number}")
            for number, row in enumerate(self._rows())
        )
        for number, text in enumerate(join_wikitext_articles(texts) if self.rows_are_lines else texts):
            yield Document(f"{self.path}:{number}", text)

    def description(self) -> dict[str, str]:
        """Return the data set, its configuration, its split and the field that was read."""
        return {
            "kind": "hub",
            "path": self.path,
            "config": self.config or "",
            "split": self.split,
            "text_field": self.text_field,
        }

    def _rows(self) -> Iterator[dict[str, object]]:
        import datasets  # type: ignore[import-untyped]  # it has no types

        features = None
        if self.string_fields:
            features = datasets.Features({name: datasets.Value("string") for name in self.string_fields})
        # datasets passes on what a dozen libraries raise (httpx, fsspec, pyarrow, zstandard, its own), so that there is
        # no narrower class: whatever happens in here is a data set that could not be read.
        try:
            yield from datasets.load_dataset(
                self.path,
                self.config,
                split=self.split,
                streaming=True,
                features=features,
                data_files=dict(self.data_files) or None,
            )
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"cannot read the data set {self.path} (config {self.config}, split {self.split}): {reason}"
            ) from error


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
