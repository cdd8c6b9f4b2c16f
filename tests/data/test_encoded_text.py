"""Texts measured as they are: what is left out, what is counted, and when bits per byte are unknown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tinyexperts import training
from tinyexperts.data import EncodedText, PrepareConfig, TokenDataset, Tokenizer, prepare
from tinyexperts.errors import InputError

EMPTY = [None, "", " ", "\n\t\r\n", "\u3000\u00a0", "\x1c"]
GOOD = ["one text", "two\r\n", "one text", "e\u0301 \u00e9", "\u200b"]


def words_tokenizer() -> Tokenizer:
    vocabulary = {"<unk>": 0, "</s>": 1, "the": 2, "cat": 3, "sees": 4}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(tokenizer.to_str())


def write_lines(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_documents_without_text_are_left_out_as_a_preparation_leaves_them_out(
    small_dataset: TokenDataset, tmp_path: Path, suffix: str
) -> None:
    tokenizer = small_dataset.tokenizer
    alone = EncodedText([write_lines(tmp_path / f"alone{suffix}", [*GOOD])], tokenizer)
    mixed_lines = [text for pair in zip(GOOD, [*EMPTY[: len(GOOD)]], strict=True) for text in pair] + EMPTY
    mixed_path = write_lines(tmp_path / f"mixed{suffix}", mixed_lines)
    mixed = EncodedText([mixed_path], tokenizer)
    assert np.array_equal(mixed.tokens, alone.tokens)
    assert (mixed.num_documents, mixed.num_empty) == (len(GOOD), len(GOOD) + len(EMPTY))
    assert (alone.num_documents, alone.num_empty) == (len(GOOD), 0)
    assert mixed.num_bytes == alone.num_bytes == sum(len(text.encode()) for text in GOOD)
    summary = prepare(PrepareConfig(files=(mixed_path,), output=tmp_path / "set", vocab_size=257))
    assert summary.index.num_empty_removed == mixed.num_empty
    assert sum(record.num_documents for record in summary.index.splits.values()) == len(set(GOOD))


def test_only_empty_documents_are_an_error_that_counts_them(small_dataset: TokenDataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no text to measure in .*a\.jsonl; 6 documents are empty$"):
        EncodedText([write_lines(tmp_path / "a.jsonl", EMPTY)], small_dataset.tokenizer)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/picture.png").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"no text to measure in .*b; 1 files were left out \(the first: .*picture"):
        EncodedText([tmp_path / "b"], small_dataset.tokenizer)


def test_bytes_are_known_where_every_document_decodes_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = EncodedText([write_lines(path, ["the cat", "the cat sees"])], words_tokenizer())
    assert (text.num_bytes, text.num_lossy, text.text_loss) == (19, 0, None)
    for number, lossy in enumerate(("the  cat", "the dog", " the cat", "the\ncat")):
        text = EncodedText([write_lines(path, ["the cat", "sees", lossy, "a", lossy])], words_tokenizer())
        assert (text.num_bytes, text.num_lossy) == (None, 3), number
        assert text.text_loss == (
            f"bits per byte are unknown: the tokenizer loses text in 3 of 5 documents (the first: {path}:3)"
        )


@pytest.mark.parametrize("change", ["Lowercase", "NFKC", "NFC"])
def test_a_normalizer_that_changes_the_text_makes_its_bytes_unknown(
    small_dataset: TokenDataset, tmp_path: Path, change: str
) -> None:
    content = json.loads((small_dataset.folder / "tokenizer.json").read_text())
    tokenizer = Tokenizer(json.dumps(content | {"normalizer": {"type": change}}))
    (tmp_path / "same.txt").write_text("it is the same \u00e9")
    assert EncodedText([tmp_path], tokenizer).num_bytes == 17
    (tmp_path / "other.txt").write_text("E\u0301 \ufb01")
    assert EncodedText([tmp_path], tokenizer).num_bytes is None
    assert EncodedText([tmp_path], small_dataset.tokenizer).num_bytes == 17 + 7


def test_names_that_are_not_utf8_are_written_with_escapes(small_dataset: TokenDataset, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"a\xff.txt")).write_text("the dog")
    (folder / os.fsdecode(b"b\xff.png")).write_bytes(b"\0")
    text = EncodedText([folder], words_tokenizer())
    assert text.text_loss is not None
    assert text.text_loss.endswith(r"(the first: a\xff.txt)")
    assert text.skipped == [rf"{tmp_path}/caf\xe9/b\xff.png is binary, not text: a zero byte at offset 0"]
    (folder / os.fsdecode(b"a\xff.txt")).unlink()
    with pytest.raises(InputError) as error:
        EncodedText([folder], words_tokenizer())
    assert str(error.value).encode().startswith(rf"no text to measure in {tmp_path}/caf\xe9; 1 files".encode())


def test_evaluate_reports_what_it_left_out_and_why_bits_are_unknown(run_cli, make_config, tmp_path):
    lines = write_lines(tmp_path / "train.jsonl", [f"the cat sees {'the cat ' * (i + 1)}" for i in range(20)])
    words_tokenizer().save(tmp_path / "words.json")
    prepare(PrepareConfig(files=(lines,), output=tmp_path / "set", tokenizer=str(tmp_path / "words.json")))
    config = make_config("dense", {"vocab_size": 5}, data=tmp_path / "set", num_steps=1)
    training.train(config, progress=False)

    known = write_lines(tmp_path / "known.jsonl", ["the cat sees the cat", None, " "])
    code, out, err = run_cli("evaluate", config.run, "--files", known)
    assert code == 0, err
    assert "left out: 2 documents without text" in err
    assert "unknown" not in out + err

    name = tmp_path / os.fsdecode(b"caf\xe9.txt")
    name.write_text("the dog")
    code, out, err = run_cli("evaluate", config.run, "--files", name)
    assert code == 0, err
    assert "loses text in 1 of 1 documents" in err
    assert r"caf\xe9.txt" in err
    assert r"caf\xe9.txt" in out.replace("\n", "")  # the title of a table is wrapped
    assert "unknown" in out

    code, out, err = run_cli("evaluate", config.run)
    assert code == 0, err
    assert "loses text in 1 of 1 documents" in err  # each line ends in a space, which words do not keep
    assert "unknown" in out
    code, out, err = run_cli("data", "verify", tmp_path / "set")
    assert code == 0, err
    assert "train: 19 documents" in out
    assert out.count("loses text in") == 2
    assert "unknown" in out
