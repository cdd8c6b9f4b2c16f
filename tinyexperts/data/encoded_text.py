"""The tokens of files that are measured once: held in memory, never written."""

from __future__ import annotations

import numpy as np

from tinyexperts.data.document import has_text, printable
from tinyexperts.data.files import FileCorpus, Paths, skipped_note
from tinyexperts.data.tokenizer import Tokenizer, text_loss
from tinyexperts.errors import InputError


class EncodedText:
    """The documents of some files as one row of tokens, as a TokenSplit holds them.

    Documents without text are left out, as a preparation leaves them out; one that is there twice counts twice.

    Attributes:
        tokens (int64 [num_tokens]): all documents, each ended by the end-of-text token.
        num_bytes (int | None): the UTF-8 bytes of all texts; None if the tokenizer loses some, of which the tokens then
            predict fewer bytes.
        num_empty (int): documents that were left out.
        num_lossy (int): documents that decoding does not give back as they were.
        text_loss (str | None): the reason why `num_bytes` is None, a sentence; else None.
        skipped (list[str]): a sentence for each file that was left out.
    """

    def __init__(self, paths: Paths, tokenizer: Tokenizer, *, text_field: str = "text") -> None:
        """Read and encode files and folders.

        Args:
            paths (Paths): one path or several.
            tokenizer (Tokenizer): the tokenizer.
            text_field (str): the field or column that holds the text, in files with records.

        Raises:
            InputError: a file that can't be read as text, or no text at all.
        """
        self.end_of_text_id = tokenizer.end_of_text_id
        self.num_documents = self.num_empty = self.num_lossy = num_bytes = 0
        self.skipped: list[str] = []
        first_lossy = ""
        parts = []
        corpus = FileCorpus(paths, text_field=text_field)
        for document in corpus.documents(self.skipped):
            if not has_text(document.text):
                self.num_empty += 1
                continue
            ids = tokenizer.encode(document.text)
            if tokenizer.loses_text([document.text], [ids])[0]:
                self.num_lossy += 1
                first_lossy = first_lossy or document.name
            parts.append(np.array([*ids, self.end_of_text_id], dtype=np.int64))
            num_bytes += len(document.text.encode())
            self.num_documents += 1
        if not parts:
            empty = f"; {self.num_empty:,} documents are empty" if self.num_empty else ""
            raise InputError(
                f"no text to measure in {', '.join(map(printable, corpus.paths))}{empty}{skipped_note(self.skipped)}"
            )
        self.text_loss = text_loss(self.num_lossy, self.num_documents, first_lossy) if self.num_lossy else None
        self.num_bytes = None if self.text_loss else num_bytes
        self.tokens = np.concatenate(parts)
        self.num_tokens = len(self.tokens)
