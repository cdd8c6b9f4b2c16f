"""The check of the kernels passes for other tables, and names what differs."""

from __future__ import annotations

import pytest
import torch

from tinyexperts.bench.check import check_experts, check_kernels
from tinyexperts.bench.contestants import make_layer
from tinyexperts.errors import InputError

D, N = 16, 64


@pytest.mark.slow
def test_the_kernels_pass_their_check_for_other_tables():
    generator = torch.Generator().manual_seed(1)
    for num_tokens in (1, 100):
        check_kernels(make_layer(34, 1024), num_tokens, ("element", "row"), generator)
    x, weights = torch.randn(5, 34, generator=generator), torch.rand(5, 7, generator=generator)
    ids = torch.randint(100, (5, 7), generator=generator)
    for dtype in (torch.bfloat16, torch.float64):
        check_experts(
            x.to(torch.promote_types(dtype, torch.float32)),
            torch.randn(100, 2, 34).to(dtype),
            ids,
            weights,
            "gelu",
            generator,
        )


def test_a_difference_is_reported_with_its_size():
    generator = torch.Generator().manual_seed(0)
    x, table, ids = torch.randn(3, D), torch.randn(N, 2, D), torch.randint(N, (3, 5))
    weights = torch.full((3, 5), float("nan"))
    with pytest.raises(InputError, match=r"the kernels' output of \[64, 2, 16\] .* by nan of its largest element"):
        check_experts(x, table, ids, weights, "gelu", generator)
