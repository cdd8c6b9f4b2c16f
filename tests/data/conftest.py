"""A small data set that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyexperts.data import PrepareConfig, TokenDataset, prepare

WORDS = ("expert", "router", "query", "key", "score", "table", "token", "batch")


def small_document(number: int) -> str:
    """A text that no other number gives, of 30 to 36 words."""
    words = [WORDS[(number * step + step // 3) % len(WORDS)] for step in range(1, 30 + number % 7)]
    return f"document {number}: {' '.join(words)}\n"


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(small_document(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_dataset(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    output = tmp_path_factory.mktemp("datasets") / "small"
    prepare(PrepareConfig(files=(small_corpus,), output=output, vocab_size=300, validation_fraction=0.1))
    return TokenDataset.open(output)
