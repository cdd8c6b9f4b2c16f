"""The machine's limit on the experts' forward pass: the time to only read whole rows at random places of a table.

Several rows are read at a time while later rows are prefetched a few cache lines at a time, as the experts' kernel does
(ops/expert_mlp/cpu.py). The fastest way differs by machine and by size of a row, so the limit is the best of several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyexperts.ops.cpu.compile import CACHE_LINE_BYTES, kernel, prefetch
from tinyexperts.ops.cpu.threads import parallel_for

_WORD_BYTES = 8
# Bytes of rows that are worth a thread's part of their own.
_MIN_BYTES = 1 << 18


class Variant(NamedTuple):
    """A way to read rows: the number read at once, the distance of prefetches, and the part of a row at a time."""

    rows_at_once: int
    rows_ahead: int
    words_at_once: int

    def __str__(self) -> str:
        return f"{self.rows_at_once} rows, {self.rows_ahead} ahead, {self.words_at_once * _WORD_BYTES} B at a time"


# The best of a wider search, on an AMD EPYC with rows of 2 and 8 KiB; the differences among them are small.
VARIANTS = tuple(Variant(*sizes) for sizes in ((4, 4, 32), (4, 8, 32), (8, 4, 32), (8, 8, 16), (8, 8, 64), (8, 16, 16)))


def words_of(table_NED: Tensor) -> Any:
    """Return the table as words of 8 bytes, [N, words] of numpy, without a copy; a row must be whole words."""
    return table_NED.detach().flatten(1).view(torch.int64).numpy()


def read_rows(words: Any, ids: Any, variant: Variant) -> None:
    """Read rows of a table on as many threads as torch uses.

    Args:
        words (int64 of numpy, [N, words]): the table, from `words_of`.
        ids (int64 of numpy, [number of rows]): the rows to read.
        variant (Variant): the way to read them.
    """
    parallel_for(
        _READERS[variant.rows_at_once],
        len(ids),
        words,
        ids,
        variant.rows_ahead,
        variant.words_at_once,
        min_items=max(1, _MIN_BYTES // (words.shape[1] * _WORD_BYTES)),
    )


# Two kernels, written out: a loop over the rows that are read side by side takes twice as long. Unsigned indices, since
# numba lets signed ones count from the end, and then nothing vectorizes.
@kernel
def _read_4(words: Any, ids: Any, ahead: int, at_once: int, start: int, stop: int) -> int:
    total, num_words = 0, words.shape[1]
    row_bytes, base, last = num_words * _WORD_BYTES, words.ctypes.data, len(ids) - 1
    whole = start + (stop - start) // 4 * 4
    for p in range(start, whole, 4):
        i0, i1, i2, i3 = ids[p], ids[p + 1], ids[p + 2], ids[p + 3]
        ahead0 = base + ids[min(p + ahead, last)] * row_bytes
        ahead1 = base + ids[min(p + ahead + 1, last)] * row_bytes
        ahead2 = base + ids[min(p + ahead + 2, last)] * row_bytes
        ahead3 = base + ids[min(p + ahead + 3, last)] * row_bytes
        for first in range(0, num_words, at_once):
            end = min(num_words, first + at_once)
            for offset in range(first * _WORD_BYTES, end * _WORD_BYTES, CACHE_LINE_BYTES):
                prefetch(ahead0 + offset)
                prefetch(ahead1 + offset)
                prefetch(ahead2 + offset)
                prefetch(ahead3 + offset)
            for w in range(np.uintp(first), np.uintp(end)):
                total += words[i0, w] + words[i1, w] + words[i2, w] + words[i3, w]
    for p in range(whole, stop):
        for w in range(np.uintp(num_words)):
            total += words[ids[p], w]
    return total


@kernel
def _read_8(words: Any, ids: Any, ahead: int, at_once: int, start: int, stop: int) -> int:
    total, num_words = 0, words.shape[1]
    row_bytes, base, last = num_words * _WORD_BYTES, words.ctypes.data, len(ids) - 1
    whole = start + (stop - start) // 8 * 8
    for p in range(start, whole, 8):
        i0, i1, i2, i3 = ids[p], ids[p + 1], ids[p + 2], ids[p + 3]
        i4, i5, i6, i7 = ids[p + 4], ids[p + 5], ids[p + 6], ids[p + 7]
        ahead0 = base + ids[min(p + ahead, last)] * row_bytes
        ahead1 = base + ids[min(p + ahead + 1, last)] * row_bytes
        ahead2 = base + ids[min(p + ahead + 2, last)] * row_bytes
        ahead3 = base + ids[min(p + ahead + 3, last)] * row_bytes
        ahead4 = base + ids[min(p + ahead + 4, last)] * row_bytes
        ahead5 = base + ids[min(p + ahead + 5, last)] * row_bytes
        ahead6 = base + ids[min(p + ahead + 6, last)] * row_bytes
        ahead7 = base + ids[min(p + ahead + 7, last)] * row_bytes
        for first in range(0, num_words, at_once):
            end = min(num_words, first + at_once)
            for offset in range(first * _WORD_BYTES, end * _WORD_BYTES, CACHE_LINE_BYTES):
                prefetch(ahead0 + offset)
                prefetch(ahead1 + offset)
                prefetch(ahead2 + offset)
                prefetch(ahead3 + offset)
                prefetch(ahead4 + offset)
                prefetch(ahead5 + offset)
                prefetch(ahead6 + offset)
                prefetch(ahead7 + offset)
            for w in range(np.uintp(first), np.uintp(end)):
                total += (words[i0, w] + words[i1, w] + words[i2, w] + words[i3, w]) + (
                    words[i4, w] + words[i5, w] + words[i6, w] + words[i7, w]
                )
    for p in range(whole, stop):
        for w in range(np.uintp(num_words)):
            total += words[ids[p], w]
    return total


_READERS: dict[int, Callable[..., int]] = {4: _read_4, 8: _read_8}
