"""The writer of a token data set: into a folder next to the final one, which is renamed when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tinyexperts.data.document import printable
from tinyexperts.data.shards.index import ShardRecord, SplitName, SplitRecord, TokenType
from tinyexperts.errors import InputError
from tinyexperts.files import exclusive_lock, sha256_of_file

MAX_TOKENS_PER_SHARD = 2**28
_UINT16_VOCABULARY = 2**16


def token_type(vocab_size: int) -> TokenType:
    """Return the smallest type of the format that holds every id: uint16 up to 65,536 of them, else uint32."""
    return "uint16" if vocab_size <= _UINT16_VOCABULARY else "uint32"


@contextlib.contextmanager
def folder_written_whole(output: Path) -> Iterator[Path]:
    """Yield an empty folder `<output>.partial`, which becomes `output` at the end, or goes when anything fails.

    A partial folder of a killed process is emptied; its lock shows if its writer still lives.

    Raises:
        InputError: `output` exists, another process is writing it, the partial folder's name is taken by something
            else, or the disk is full or refuses.
    """
    if output.exists():
        raise InputError(f"{printable(output)} exists; choose another name or delete it")
    partial = output.with_name(output.name + ".partial")
    lock_path = partial / "lock"
    if partial.exists() and not lock_path.exists():
        raise InputError(f"{printable(partial)} is in the way and is not an unfinished data set; rename or delete it")
    try:
        with exclusive_lock(lock_path, f"another process is writing {printable(output)}"):
            try:
                for left_over in partial.iterdir():
                    if left_over != lock_path:
                        left_over.unlink()
                yield partial
                lock_path.unlink(missing_ok=True)
                partial.rename(output)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise InputError(
            f"cannot write {printable(output)}, nothing of it is kept: {error.strerror or error}"
        ) from error


class SplitWriter:
    """The writer of one split: its documents go to its shards, one after the other."""

    def __init__(
        self,
        folder: Path,
        split: SplitName,
        *,
        vocab_size: int,
        end_of_text_id: int,
        max_tokens_per_shard: int = MAX_TOKENS_PER_SHARD,
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(token_type(vocab_size)).newbyteorder("<")
        self._end_of_text_id = end_of_text_id
        self._max_tokens_per_shard = max_tokens_per_shard
        self._shards: list[ShardRecord] = []
        self._documents = array("q")
        self._num_tokens = 0
        self._num_bytes = 0
        self._num_lossy_documents = 0
        self._num_tokens_in_shard = 0
        self._digest = hashlib.sha256()
        self._file = self._shard_path(0).open("wb")

    def write(self, ids: Sequence[int], num_bytes: int, *, is_lossy: bool = False) -> None:
        """Append a document.

        Args:
            ids (Sequence[int]): its ids without the end-of-text token, which is added.
            num_bytes (int): the bytes of its text.
            is_lossy (bool): True if decoding the ids gives another text.
        """
        self._documents.extend((self._num_tokens, num_bytes))
        self._num_tokens += len(ids) + 1
        self._num_bytes += num_bytes
        self._num_lossy_documents += is_lossy
        tokens = np.empty(len(ids) + 1, dtype=self._dtype)
        tokens[:-1] = ids
        tokens[-1] = self._end_of_text_id
        while len(tokens):
            if self._num_tokens_in_shard == self._max_tokens_per_shard:
                self._end_shard()
                self._file = self._shard_path(len(self._shards)).open("wb")
            room = self._max_tokens_per_shard - self._num_tokens_in_shard
            content = tokens[:room].tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._num_tokens_in_shard += len(tokens[:room])
            tokens = tokens[room:]

    def finish(self) -> SplitRecord:
        """End the last shard, write the document table, and return what was written."""
        self._end_shard()
        documents = np.array(self._documents, dtype="<i8").reshape(-1, 2)
        documents_path = self._folder / f"{self._split}-documents.npy"
        np.save(documents_path, documents, allow_pickle=False)
        return SplitRecord(
            shards=tuple(self._shards),
            documents_file=documents_path.name,
            documents_sha256=sha256_of_file(documents_path),
            num_documents=len(documents),
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            num_lossy_documents=self._num_lossy_documents,
        )

    def close(self) -> None:
        """Close the file; for a split that is given up."""
        self._file.close()

    def _shard_path(self, number: int) -> Path:
        return self._folder / f"{self._split}-{number:05d}.bin"

    def _end_shard(self) -> None:
        self._file.close()
        file = self._shard_path(len(self._shards)).name
        self._shards.append(
            ShardRecord(file=file, num_tokens=self._num_tokens_in_shard, sha256=self._digest.hexdigest())
        )
        self._digest = hashlib.sha256()
        self._num_tokens_in_shard = 0
