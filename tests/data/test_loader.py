from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tinyexperts.data import TokenDataset, TokenLoader, TokenSplit, evaluation_windows
from tinyexperts.errors import InputError


@pytest.fixture
def split(small_dataset: TokenDataset) -> TokenSplit:
    return small_dataset.split("train")


def window_ids(loader: TokenLoader, num_steps: int) -> list[int]:
    return [int(id_) for step in range(num_steps) for id_ in loader.batch(step).sequence_ids]


def test_rows_are_the_windows_that_their_ids_name(split: TokenSplit) -> None:
    loader = TokenLoader(split, batch_size=6, context_length=16, seed=0)
    tokens = torch.from_numpy(split.tokens[:])
    for step in (0, 3, 1000):
        batch = loader.batch(step)
        assert batch.inputs.dtype == batch.targets.dtype == batch.sequence_ids.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape == (6, 16)
        for row, window in enumerate(batch.sequence_ids.tolist()):
            assert torch.equal(batch.inputs[row], tokens[window * 16 : window * 16 + 16])
            assert torch.equal(batch.targets[row], tokens[window * 16 + 1 : window * 16 + 17])


def test_windows_predict_each_token_but_the_first_and_the_last_few_once(split: TokenSplit) -> None:
    length = 16
    loader = TokenLoader(split, batch_size=1, context_length=length, seed=0)
    num_predicted = np.zeros(split.num_tokens, dtype=np.int64)
    for window in window_ids(loader, loader.num_windows):
        num_predicted[window * length + 1 : window * length + length + 1] += 1
    num_covered = loader.num_windows * length
    assert num_predicted[0] == 0
    assert (num_predicted[1 : num_covered + 1] == 1).all()
    assert split.num_tokens - 1 - num_covered < length


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_epoch_visits_each_window_once_across_step_boundaries(split: TokenSplit, batch_size: int) -> None:
    loader = TokenLoader(split, batch_size=batch_size, context_length=32, seed=5)
    num_epochs = 3
    visited = window_ids(loader, num_epochs * loader.num_windows // batch_size + 1)
    epochs = [visited[e * loader.num_windows : (e + 1) * loader.num_windows] for e in range(num_epochs)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(loader.num_windows))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]


def test_each_window_comes_once_though_the_number_of_ranks_changes_within_the_epoch(split: TokenSplit) -> None:
    visited: list[int] = []
    num_windows = TokenLoader(split, batch_size=4, context_length=32, seed=5).num_windows
    for step in range(num_windows // 4):
        num_ranks = (1, 2, 4)[3 * step // (num_windows // 4)]
        for rank in range(num_ranks):
            loader = TokenLoader(split, batch_size=4, context_length=32, seed=5, rank=rank, num_ranks=num_ranks)
            visited += loader.batch(step).sequence_ids.tolist()
    assert len(visited) == len(set(visited)) == num_windows // 4 * 4


def test_batch_is_a_pure_function_of_seed_and_step(split: TokenSplit) -> None:
    def loader(seed: int) -> TokenLoader:
        return TokenLoader(split, batch_size=4, context_length=16, seed=seed)

    in_order = loader(1)
    expected = [in_order.batch(step) for step in range(100)]
    jumping = loader(1)
    for step in (99, 0, 57, 57, 3):
        for fresh in (jumping, loader(1)):
            batch = fresh.batch(step)
            assert torch.equal(batch.inputs, expected[step].inputs)
            assert torch.equal(batch.targets, expected[step].targets)
            assert torch.equal(batch.sequence_ids, expected[step].sequence_ids)
    assert not torch.equal(loader(2).batch(0).sequence_ids, expected[0].sequence_ids)


@pytest.mark.parametrize("num_ranks", [2, 3, 12])
def test_ranks_together_have_the_batch_of_one_rank(split: TokenSplit, num_ranks: int) -> None:
    options = {"batch_size": 12, "context_length": 16, "seed": 0}
    whole = TokenLoader(split, **options)
    ranks = [TokenLoader(split, **options, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for step in (0, whole.num_windows // 12):  # the second holds the end of one epoch and the start of the next
        batches = [rank.batch(step) for rank in ranks]
        expected = whole.batch(step)
        assert all(len(batch.inputs) == 12 // num_ranks for batch in batches)
        assert torch.equal(torch.cat([batch.inputs for batch in batches]), expected.inputs)
        assert torch.equal(torch.cat([batch.targets for batch in batches]), expected.targets)
        assert torch.equal(torch.cat([batch.sequence_ids for batch in batches]), expected.sequence_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7, "num_ranks": 2}, "batch_size must be a multiple of the 2 ranks, got 7"),
        ({"batch_size": 0}, "batch_size and context_length must be positive, got 0 and 16"),
        ({"context_length": 0}, "batch_size and context_length must be positive, got 4 and 0"),
        ({"rank": 2, "num_ranks": 2}, "rank must be between 0 and num_ranks - 1, got rank 2 of 2"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_impossible_batches_are_refused(split: TokenSplit, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenLoader(split, **({"batch_size": 4, "context_length": 16, "seed": 0} | options))


def test_context_longer_than_the_split_names_the_longest(split: TokenSplit) -> None:
    longest = split.num_tokens - 1
    batch = TokenLoader(split, batch_size=2, context_length=longest, seed=0).batch(0)
    assert batch.sequence_ids.tolist() == [0, 0]
    with pytest.raises(InputError, match=rf"context_length must be at most {longest}, .*, got {longest + 1}"):
        TokenLoader(split, batch_size=1, context_length=longest + 1, seed=0)
    with pytest.raises(InputError, match="step must not be negative"):
        TokenLoader(split, batch_size=1, context_length=16, seed=0).batch(-1)


@pytest.mark.parametrize("context_length", [1, 7, 16, 10_000])
def test_evaluation_predicts_every_token_once_in_order(small_dataset: TokenDataset, context_length: int) -> None:
    split = small_dataset.split("validation")
    windows = list(evaluation_windows(split, context_length))
    tokens = torch.from_numpy(split.tokens[:])
    end_of_text = torch.tensor([small_dataset.tokenizer.end_of_text_id])
    assert torch.equal(torch.cat([targets for _, targets in windows]), tokens)
    assert torch.equal(torch.cat([inputs for inputs, _ in windows]), torch.cat([end_of_text, tokens[:-1]]))
    assert all(len(inputs) == len(targets) == context_length for inputs, targets in windows[:-1])
    assert 0 < len(windows[-1][0]) <= context_length
    with pytest.raises(InputError, match="must be positive, got 0 and None"):
        evaluation_windows(split, 0)


def test_chosen_windows_are_spread_over_the_whole_split(small_dataset: TokenDataset) -> None:
    split = small_dataset.split("validation")
    windows = list(evaluation_windows(split, 5))
    for max_windows in (1, 2, 3, len(windows) // 2 + 1, len(windows) - 1, len(windows), 10_000):
        chosen = list(evaluation_windows(split, 5, max_windows=max_windows))
        num_chosen = min(max_windows, len(windows))
        assert len(chosen) == num_chosen
        for part, (inputs, targets) in enumerate(chosen):
            # One window in each of num_chosen equal parts of the split.
            first, last = part * len(windows) // num_chosen, math.ceil((part + 1) * len(windows) / num_chosen)
            assert any(torch.equal(inputs, i) and torch.equal(targets, t) for i, t in windows[first:last])
    with pytest.raises(InputError, match="must be positive, got 5 and 0"):
        evaluation_windows(split, 5, max_windows=0)
