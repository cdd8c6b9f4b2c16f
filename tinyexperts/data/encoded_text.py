"""Tokens of files that are measured once: held in memory, never written."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from tinyexperts.data.files import FileCorpus, skipped_note
from tinyexperts.data.tokenizer import Tokenizer
from tinyexperts.errors import InputError


class EncodedText:
    """The documents of some files as one row of tokens, as a TokenSplit holds them.

    tokens (int64 [num_tokens]): all documents, each ended by the end-of-text token.
    num_bytes: the UTF-8 bytes of all texts.
    """

    def __init__(self, paths: Collection[Path], tokenizer: Tokenizer, *, text_field: str = "text") -> None:
        """Read and encode files and folders.

        Raises:
            InputError: a file that can't be read as text, or no text at all.
        """
        self.end_of_text_id = tokenizer.end_of_text_id
        self.num_bytes = self.num_documents = 0
        self.skipped: list[str] = []
        parts = []
        for document in FileCorpus(paths, text_field=text_field).documents(self.skipped):
            parts.append(np.array([*tokenizer.encode(document.text), self.end_of_text_id], dtype=np.int64))
            self.num_bytes += len(document.text.encode())
            self.num_documents += 1
        if not self.num_bytes:
            raise InputError(
                f"no text to measure in {', '.join(str(path) for path in paths)}" + skipped_note(self.skipped)
            )
        self.tokens = np.concatenate(parts)
        self.num_tokens = len(self.tokens)
