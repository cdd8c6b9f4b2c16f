"""The limit reads every row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyexperts.bench import limit


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 64, 67])
@pytest.mark.parametrize("variant", limit.VARIANTS, ids=str)
def test_the_limit_reads_every_word_of_every_row_once(variant, num_rows):
    table = torch.randn(20, 2, 26)
    words = limit.words_of(table)
    ids = torch.randint(20, (num_rows,)).numpy()
    reader = limit._READERS[variant.rows_at_once]
    expected = words[ids].sum()  # both wrap around
    assert reader(words, ids, variant.rows_ahead, variant.words_at_once, 0, num_rows) == expected
    # In two parts, as two threads read them.
    bounds = ((0, num_rows // 2), (num_rows // 2, num_rows))
    parts = [reader(words, ids, variant.rows_ahead, variant.words_at_once, *part) for part in bounds]
    assert np.array(parts).sum() == expected
