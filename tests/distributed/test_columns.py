"""A layer whose table is shared by columns gives what the whole layer gives: outputs, every gradient, statistics."""

from __future__ import annotations

import pytest
import torch
from columns_on_ranks import compare_choices, compare_layers, copy_layer, count_elements, refuse, train_layers
from ranks import run_ranks

from tinyexperts.ops.expert_mlp import columns_cpu, portable


@pytest.mark.parametrize(
    ("num_ranks", "num_shards", "portably"),
    [
        (2, 2, False),
        pytest.param(4, 2, False, marks=pytest.mark.slow),
        pytest.param(4, 4, True, marks=pytest.mark.slow),
    ],
)
def test_shared_columns_give_what_the_whole_table_gives(num_ranks, num_shards, portably):
    run_ranks(compare_layers, num_ranks, num_shards, portably)


def test_experts_choose_among_the_tokens_of_all_ranks():
    run_ranks(compare_choices, 2)


def test_a_layer_with_shared_columns_is_copied():
    run_ranks(copy_layer, 2)


@pytest.mark.slow
def test_shared_columns_are_trained_as_the_whole_table():
    run_ranks(train_layers, 4, 2)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_token_sends_what_the_formula_says(num_ranks):
    run_ranks(count_elements, num_ranks)


def test_columns_that_cannot_be_shared_are_refused():
    run_ranks(refuse, 2)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_steps_equal_the_formula(first, dtype):
    """Odd sizes, no tokens, and experts that are met several times."""
    generator = torch.Generator().manual_seed(0)
    for num_tokens, num_retrieved, dim in ((0, 3, 8), (5, 7, 33), (3, 4, 64), (2, 1, 1)):
        experts = torch.randn(9, 3, dim, generator=generator, dtype=dtype)
        ids = torch.randint(9, (num_tokens, num_retrieved), generator=generator)
        x = torch.randn(num_tokens, dim, generator=generator, dtype=dtype)
        factors = torch.randn(2, num_tokens, num_retrieved, generator=generator, dtype=dtype)
        rows = experts[ids][:, :, first : first + 2]
        for steps in (columns_cpu, portable):
            products = steps.products(x, experts, ids, first, 2)
            torch.testing.assert_close(products, torch.einsum("mpfd,md->fmp", rows, x))
            total = steps.weighted_sum(factors, experts, ids, first)
            torch.testing.assert_close(total, torch.einsum("mpfd,fmp->md", rows, factors), atol=1e-5, rtol=1e-5)
