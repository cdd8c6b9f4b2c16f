"""Layers in somebody's DistributedDataParallel."""

from __future__ import annotations

import pytest
from ddp_on_ranks import be_told_of_sparse_gradients, train_as_one
from ranks import run_ranks


@pytest.mark.slow
def test_sparse_gradients_are_told_of():
    run_ranks(be_told_of_sparse_gradients, 2)


def test_dense_gradients_are_averaged():
    run_ranks(train_as_one, 2)
