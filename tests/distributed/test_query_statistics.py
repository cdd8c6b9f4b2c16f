"""Query batch norm over the tokens of all ranks, under DistributedDataParallel, gives what one process gives."""

from __future__ import annotations

import pytest
import torch
from query_statistics_on_ranks import (
    checkpoint_without_running_statistics,
    compare_with_one_process,
    copy_and_pickle,
    do_without_real_tokens,
    keep_frozen,
    mask_with_a_shared_table,
    refuse,
)
from ranks import run_ranks


@pytest.mark.parametrize(
    ("dtype", "counts", "masked", "momentum", "copied"),
    [
        (torch.float64, (6, 6), False, 0.1, "not"),
        (torch.float64, (3, 9), False, 0.1, "inside"),
        (torch.float64, (9, 4), True, 0.1, "wrapped"),
        (torch.float64, (7, 0), False, None, "twice"),
        (torch.float64, (0, 8), True, None, "inside"),
        (torch.float32, (9, 4), True, None, "not"),
        (torch.float32, (1, 9), False, 0.1, "inside"),
    ],
)
def test_ranks_give_what_one_process_gives(dtype, counts, masked, momentum, copied):
    run_ranks(compare_with_one_process, 2, dtype, counts, masked, momentum, copied)


def test_a_rank_or_all_without_real_tokens():
    run_ranks(do_without_real_tokens, 2)


def test_a_mask_with_a_table_that_is_shared_by_columns():
    run_ranks(mask_with_a_shared_table, 2)


def test_checkpointing_and_evaluation_without_running_statistics():
    run_ranks(checkpoint_without_running_statistics, 2)


def test_a_frozen_norm_exchanges_nothing():
    run_ranks(keep_frozen, 2)


def test_copies_share_the_group_and_pickles_leave_it_out():
    run_ranks(copy_and_pickle, 2)


def test_what_cannot_be_shared_is_told():
    run_ranks(refuse, 2)
