"""The index of a token data set, index.json: what its files must hold.

A data set is a folder:
    index.json                 this index
    tokenizer.json             the tokenizer of all the tokens
    train-00000.bin, ...       token ids, little-endian uint16 or uint32; each document ends with the end-of-text token
    train-documents.npy        int64 [num_documents, 2]: the document's first token, and the bytes of its text
    validation-00000.bin, validation-documents.npy
A data set of facts has two more held-out splits, unseen-phrasing and unseen-entities, and:
    facts.json                 the table of facts and the phrasings (data/facts/fact_set.py)
    train-facts.npy, ...       int32 [num_documents, 4]: the fact that each document states, and where its answer begins
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tinyexperts.data.document import printable
from tinyexperts.errors import InputError

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_NAME: Final = "tinyexperts-tokens"
FORMAT_VERSION: Final = 1

SplitName = Literal["train", "validation", "unseen-phrasing", "unseen-entities"]
TokenType = Literal["uint16", "uint32"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation")
"""The splits of every data set."""
FACT_SPLIT_NAMES: tuple[SplitName, ...] = (*SPLIT_NAMES, "unseen-phrasing", "unseen-entities")
"""The splits of a data set of facts."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardRecord(_Record):
    """One file of tokens."""

    file: str
    num_tokens: int
    sha256: str


class FileRecord(_Record):
    """A file and its checksum."""

    file: str
    sha256: str


class SplitRecord(_Record):
    """One split: its shards in order, its document table, and its sizes; bytes are of the text in UTF-8."""

    shards: tuple[ShardRecord, ...]
    documents_file: str
    documents_sha256: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_lossy_documents: int | None = None
    """The documents that decoding does not give back as they were; None: written before this was counted."""
    facts: FileRecord | None = None
    """The file that says which fact each document states; None: the documents are no statements of facts."""


class DatasetIndex(_Record):
    """The content of index.json."""

    format: Literal["tinyexperts-tokens"] = FORMAT_NAME
    version: Literal[1] = FORMAT_VERSION
    tokenizer_sha256: str
    vocab_size: int
    dtype: TokenType
    corpus: dict[str, str]
    seed: int
    validation_fraction: float
    num_duplicates_removed: int
    num_empty_removed: int
    num_files_skipped: int
    splits: dict[SplitName, SplitRecord]
    facts: FileRecord | None = None
    """The table of facts and the phrasings, of a data set of facts."""

    def write(self, folder: Path) -> None:
        """Write index.json."""
        (folder / INDEX_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_index(folder: Path) -> DatasetIndex:
    """Read the index of a data set.

    Raises:
        InputError: no data set in this folder, one of another version, or a damaged index.
    """
    if not folder.is_dir():
        raise InputError(f"no such data set: {printable(folder)} (tinyexperts data prepare makes one)")
    path = folder / INDEX_FILE
    shown = printable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{printable(folder)} is not a data set: it has no {INDEX_FILE}") from error
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{shown} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        raise InputError(f"{shown} is not the index of a data set: its format must be {FORMAT_NAME!r}")
    if content.get("version") != FORMAT_VERSION:
        raise InputError(f"{shown} has version {content.get('version')!r}, this program reads version {FORMAT_VERSION}")
    try:
        index = DatasetIndex.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{shown} is damaged: {where}: {first['msg']}") from error
    missing = [name for name in SPLIT_NAMES if name not in index.splits]
    if missing:
        raise InputError(f"{shown} is damaged: it has no split {missing[0]}")
    return index


def sha256_of_splits(index: DatasetIndex) -> str:
    """Return the sha256, in hexadecimal, of the splits' entries in the index: their files' checksums and sizes."""
    # Without what follows from the text and the tokenizer, and older data sets don't say.
    derived = {"num_lossy_documents", "facts"}
    splits = {name: record.model_dump(exclude=derived) for name, record in sorted(index.splits.items())}
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
