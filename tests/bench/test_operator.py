"""The ids that the operator is measured with."""

from __future__ import annotations

import torch

from tinyexperts.bench.operator import draw_ids


def test_zipf_ids_follow_their_law():
    generator = torch.Generator().manual_seed(0)
    ids = draw_ids("zipf", 100, (1000, 64), generator)
    assert ids.dtype == torch.int64
    shares = ids.flatten().bincount(minlength=100).double().sort(descending=True).values / ids.numel()
    law = 1 / torch.arange(1, 101, dtype=torch.float64)
    torch.testing.assert_close(shares, law / law.sum(), atol=4e-3, rtol=0)
    uniform = draw_ids("uniform", 100, (1000, 64), generator).flatten().bincount(minlength=100)
    assert len(uniform) == 100
    assert uniform.min() > 500
