"""The reader of a token data set: memory-mapped, checked against its index (the format is in index.py)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from tinyexperts.data.document import printable
from tinyexperts.data.facts.fact_set import FactSet, SplitFacts, read_fact_set
from tinyexperts.data.shards.index import (
    TOKENIZER_FILE,
    DatasetIndex,
    SplitName,
    SplitRecord,
    read_index,
    sha256_of_splits,
)
from tinyexperts.data.tokenizer import Tokenizer, text_loss
from tinyexperts.errors import InputError
from tinyexperts.files import sha256_of_file


class ShardedTokens:
    """The tokens of one split as one sequence, whatever the number of files; `tokens[start:stop]` reads int64 ids."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = shards
        self._ends = list(accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return a copy of the ids at these positions, as a list would be sliced.

        Raises:
            ValueError: a step other than 1.
        """
        start, stop, step = positions.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in steps of 1, got {step}")
        ids = np.empty(max(stop - start, 0), dtype=np.int64)
        shard_start = 0
        for shard, shard_end in zip(self._shards, self._ends, strict=True):
            first, last = max(start, shard_start), min(stop, shard_end)
            if first < last:
                ids[first - start : last - start] = shard[first - shard_start : last - shard_start]
            shard_start = shard_end
        return ids


class TokenSplit:
    """One split of a data set.

    Attributes:
        tokens (ShardedTokens, num_tokens ids): all documents, each ended by the end-of-text token.
        documents (int64 [num_documents, 2]): each document's first token, and the bytes of its text.
        num_bytes (int | None): the UTF-8 bytes of all texts, by which bits per byte are counted; None if the tokenizer
            loses text, of which the tokens then predict fewer bytes (the index has the number all the same).
        tokenizer (Tokenizer): the tokenizer of the data set.
        facts (SplitFacts | None): the fact that each document states; None: the documents are no statements of facts.
        text_loss (str | None): the reason why `num_bytes` is None, a sentence; else None.
    """

    def __init__(
        self, folder: Path, name: SplitName, index: DatasetIndex, tokenizer: Tokenizer, fact_set: FactSet | None
    ) -> None:
        """Map the files of the split.

        Args:
            folder (Path): the folder of the data set.
            name (SplitName): train or validation.
            index (DatasetIndex): the index of the data set.
            tokenizer (Tokenizer): its tokenizer.

        Raises:
            InputError: a missing or truncated file.
        """
        record = index.splits[name]
        self.name = name
        self.tokenizer = tokenizer
        self.end_of_text_id = tokenizer.end_of_text_id
        self.vocab_size = index.vocab_size
        self.num_tokens = record.num_tokens
        self.text_loss = _text_loss(record, tokenizer)
        self.num_bytes = None if self.text_loss else record.num_bytes
        self.num_documents = record.num_documents
        dtype = np.dtype(index.dtype).newbyteorder("<")
        shards = []
        for shard in record.shards:
            path = folder / shard.file
            _check_size(path, shard.num_tokens * dtype.itemsize)
            shards.append(np.memmap(path, dtype=dtype, mode="r"))
        self.tokens = ShardedTokens(shards)
        self.documents = _read_rows(folder / record.documents_file, (record.num_documents, 2), np.int64)
        self.facts = (
            None
            if record.facts is None or fact_set is None
            else SplitFacts(fact_set, _read_rows(folder / record.facts.file, (record.num_documents, 4), np.int32))
        )

    def document(self, number: int) -> np.ndarray:
        """Return the ids (int64) of one document, the end-of-text token last.

        Raises:
            IndexError: no such document.
        """
        start = int(self.documents[number, 0])
        is_last = number in (-1, self.num_documents - 1)
        return self.tokens[start : self.num_tokens if is_last else int(self.documents[number + 1, 0])]


class TokenDataset:
    """A prepared data set: its tokenizer and its two splits; `sha256` identifies its tokens."""

    def __init__(self, folder: Path, index: DatasetIndex, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.index = index
        self.tokenizer = tokenizer
        self.sha256 = sha256_of_splits(index)
        fact_set = None if index.facts is None else read_fact_set(folder / index.facts.file)
        self._splits = {name: TokenSplit(folder, name, index, tokenizer, fact_set) for name in index.splits}

    @property
    def held_out_splits(self) -> list[TokenSplit]:
        """All splits but the training split."""
        return [split for name, split in self._splits.items() if name != "train"]

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> TokenDataset:
        """Open a data set.

        Args:
            path (Path): its folder.
            verify (bool): compare all files with their checksums, which takes about a second for each GB of tokens.

        Raises:
            InputError: no data set, another version, a truncated or corrupt file, or the tokens of another tokenizer.
        """
        folder = Path(path)
        index = read_index(folder)
        tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
        if tokenizer.hash != index.tokenizer_sha256:
            raise InputError(
                f"the tokens of {printable(folder)} were made by another tokenizer than its {TOKENIZER_FILE}: sha256 "
                f"{index.tokenizer_sha256[:12]} in the index, {tokenizer.hash[:12]} in the file"
            )
        dataset = cls(folder, index, tokenizer)
        if verify:
            dataset.verify()
        return dataset

    def split(self, name: SplitName) -> TokenSplit:
        """Return "train", "validation", or another split that this data set has.

        Raises:
            InputError: another name.
        """
        if name not in self._splits:
            raise InputError(f"{printable(self.folder)} has the splits {', '.join(self._splits)}, got {name!r}")
        return self._splits[name]

    def verify(self) -> None:
        """Read every file and compare its sha256 with the index.

        Raises:
            InputError: a file whose content is not what was written.
        """
        records = self.index.splits.values()
        expected = {shard.file: shard.sha256 for record in records for shard in record.shards}
        expected |= {record.documents_file: record.documents_sha256 for record in records}
        expected |= {record.facts.file: record.facts.sha256 for record in records if record.facts is not None}
        if self.index.facts is not None:
            expected[self.index.facts.file] = self.index.facts.sha256
        for file, sha256 in expected.items():
            if sha256_of_file(self.folder / file) != sha256:
                raise InputError(
                    f"{printable(self.folder / file)} is corrupt: its sha256 is not the index's; prepare it again"
                )


def _text_loss(record: SplitRecord, tokenizer: Tokenizer) -> str | None:
    if record.num_lossy_documents:
        return text_loss(record.num_lossy_documents, record.num_documents)
    if record.num_lossy_documents is None and not tokenizer.keeps_every_text:
        return "bits per byte are unknown: whether the tokenizer loses text is not recorded; prepare the data set again"
    return None


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise InputError(f"the data set is incomplete: {printable(path)} is missing")
    actual_bytes = path.stat().st_size
    if actual_bytes != expected_bytes:
        state = "truncated" if actual_bytes < expected_bytes else "too long"
        raise InputError(f"{printable(path)} is {state}: it has {actual_bytes} bytes, the index says {expected_bytes}")


def _read_rows(path: Path, shape: tuple[int, int], dtype: type[np.integer[Any]]) -> np.ndarray:
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"the data set is incomplete: {printable(path)} is missing") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{printable(path)} is truncated or corrupt: {error}") from error
    if rows.shape != shape or rows.dtype != dtype:
        raise InputError(
            f"{printable(path)} must be {np.dtype(dtype)} {list(shape)}, got {rows.dtype} {list(rows.shape)}"
        )
    return rows
