"""The documents of a preparation on disk: read from their source once, without duplicates, then gone through twice.

A streamed corpus would otherwise be downloaded once to train the tokenizer and once to encode, and could change.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from tinyexperts.data.document import has_text
from tinyexperts.data.shards.index import SPLIT_NAMES, SplitName
from tinyexperts.errors import InputError


class SplitDocuments(Protocol):
    """Documents, each in one split, that can be gone through again in the same order."""

    split_names: tuple[SplitName, ...]
    num_bytes: int
    num_duplicates: int
    num_empty: int

    def texts(self) -> Iterator[tuple[SplitName, str]]:
        """Yield each document's split and text."""
        ...


class DocumentSpool:
    """Distinct documents in one file, in the order in which they came; memory holds 16 bytes of digest for each.

    Two texts that differ in white space only are the same document, and the first is kept.
    """

    def __init__(self, path: Path, *, seed: int) -> None:
        self._path = path
        self._file = path.open("wb")
        self._key = f"tinyexperts {seed}".encode()
        self._digests: dict[bytes, None] = {}
        self._lengths = array("q")
        self._validation: frozenset[int] = frozenset()
        self.split_names = SPLIT_NAMES
        self.num_bytes = 0
        self.num_duplicates = 0
        self.num_empty = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, text: str) -> None:
        """Keep a document, unless it is empty or known, which is counted."""
        if not has_text(text):
            self.num_empty += 1
            return
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16, key=self._key).digest()
        if digest in self._digests:
            self.num_duplicates += 1
            return
        content = text.encode()
        self._file.write(content)
        self._digests[digest] = None
        self._lengths.append(len(content))
        self.num_bytes += len(content)

    def finish(self) -> None:
        """End the writing."""
        self._file.close()

    def texts(self) -> Iterator[tuple[SplitName, str]]:
        """Yield each document's split and text."""
        with self._path.open("rb") as file:
            for number, length in enumerate(self._lengths):
                yield "validation" if number in self._validation else "train", file.read(length).decode()

    def remove(self) -> None:
        """Delete the file."""
        self._file.close()
        self._path.unlink()

    def hold_out(self, fraction: float) -> None:
        """Choose the documents for validation: the ceil(fraction * n) whose digests under the seed are lowest.

        The digest is of the text, so the choice does not depend on the order or the names of the documents. Ranking
        digests, where the usual rule compares each with a threshold, gives exactly the number asked for: by a threshold
        20 documents at 0.05 would leave validation empty every third time.

        Raises:
            InputError: one of the two splits would be empty.
        """
        num_documents = len(self)
        # The decimal that was written, so that 0.07 of 100 are 7 documents and not, by its binary neighbor, 8.
        num_validation = math.ceil(Fraction(str(fraction)) * num_documents)
        if num_validation >= num_documents:
            if num_documents == 1:
                raise InputError(
                    "the validation split would be empty: documents are never cut, and the corpus has 1 distinct "
                    "document; give at least 2 files, or .jsonl with a document on each line"
                )
            raise InputError(
                f"the training split would be empty: validation takes {num_validation} of {num_documents} distinct "
                f"documents at validation_fraction {fraction}; give more documents or a smaller fraction"
            )
        digests = list(self._digests)
        by_digest = sorted(range(num_documents), key=digests.__getitem__)
        self._validation = frozenset(by_digest[:num_validation])
