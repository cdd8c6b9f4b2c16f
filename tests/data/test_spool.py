from __future__ import annotations

import random
from pathlib import Path

import pytest

from tinyexperts.data.spool import DocumentSpool
from tinyexperts.errors import InputError


def spool_of(path: Path, texts: list[str], seed: int = 0) -> DocumentSpool:
    spool = DocumentSpool(path / "spool", seed=seed)
    for text in texts:
        spool.add(text)
    spool.finish()
    return spool


def held_out(path: Path, texts: list[str], fraction: float, seed: int = 0) -> set[str]:
    spool = spool_of(path, texts, seed)
    spool.hold_out(fraction)
    return {text for split, text in spool.texts() if split == "validation"}


def test_distinct_texts_come_back_as_they_were(tmp_path: Path) -> None:
    texts = ["a\r\nb", "日本語 \n", "x" * 100_000]
    spool = spool_of(tmp_path, texts)
    assert list(spool.texts()) == [("train", text) for text in texts]
    assert spool.num_bytes == sum(len(text.encode()) for text in texts)
    spool.remove()
    assert list(tmp_path.iterdir()) == []


def test_duplicates_up_to_white_space_are_removed_and_the_first_kept(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, ["a b", "c", " a\n\tb ", "ab", "c", ""])
    assert [text for _, text in spool.texts()] == ["a b", "c", "ab"]
    assert (spool.num_duplicates, spool.num_empty) == (2, 1)
    assert spool_of(tmp_path, ["", " \n"]).num_empty == 2


@pytest.mark.parametrize(
    ("num_documents", "fraction", "expected"),
    [(2, 0.05, 1), (20, 0.05, 1), (21, 0.05, 2), (100, 0.07, 7), (10, 0.9, 9)],
)
def test_validation_has_exactly_its_share_rounded_up(
    tmp_path: Path, num_documents: int, fraction: float, expected: int
) -> None:
    assert len(held_out(tmp_path, [f"text {i}" for i in range(num_documents)], fraction)) == expected


def test_split_depends_on_the_texts_and_the_seed_and_not_on_their_order(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(200)]
    shuffled = random.Random(0).sample(texts, len(texts))
    chosen = held_out(tmp_path, texts, 0.2)
    assert held_out(tmp_path, shuffled, 0.2) == chosen
    assert held_out(tmp_path, texts, 0.2, seed=1) != chosen
    # Neither the first nor the last: positions are spread over the corpus.
    positions = sorted(int(text.split()[1]) for text in chosen)
    assert positions[0] < 40
    assert positions[-1] >= 160


def test_more_validation_keeps_what_was_held_out_before(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(100)]
    assert held_out(tmp_path, texts, 0.1) < held_out(tmp_path, texts, 0.3)


def test_empty_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the validation split would be empty: .* has 1 distinct document\b"):
        spool_of(tmp_path, ["only one", "only  one"]).hold_out(0.05)
    with pytest.raises(
        InputError, match=r"the training split would be empty: .* 3 of 3 distinct documents .*0\.9; give more"
    ):
        spool_of(tmp_path, ["a", "b", "c"]).hold_out(0.9)
