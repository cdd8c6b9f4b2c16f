from __future__ import annotations

import base64
from pathlib import Path

import pytest
import tiktoken

from tinyexperts.data import gpt2_ranks
from tinyexperts.data.gpt2_ranks import read_gpt2_ranks, tokenizer_from_ranks
from tinyexperts.data.tokenizer import END_OF_TEXT, Tokenizer
from tinyexperts.errors import InputError

# GPT-2's pattern, as tiktoken writes it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# A small vocabulary in which the parts of a token are not its longest prefix: "abc" is a + bc, as bc comes before ab.
MERGES = [b"bc", b"ab", b"abc", b" a", b" abc", b"ll", b"'ll", b"\xe6\x97", b"\xe6\x97\xa5", b"  ", b"    ", b"12"]
RANKS = {bytes([byte]): rank for rank, byte in enumerate([*range(33, 127), *range(33), *range(127, 256)])}
RANKS |= {token: 256 + i for i, token in enumerate(MERGES)}
TEXTS = [
    "abc ab abcabc a bc",
    "we'll 'll  \n\n    x   ",
    "日本語 é 🎉",
    "1234 121\r\n\t",
    f"a{END_OF_TEXT}",
    "",
    "\x00",
]


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def test_tokens_are_those_of_tiktoken() -> None:
    expected = tiktoken.Encoding(
        "small", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={END_OF_TEXT: len(RANKS)}
    )
    tokenizer = Tokenizer(tokenizer_from_ranks(RANKS, END_OF_TEXT).to_str())
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_of_text_id == len(RANKS)
    assert tokenizer.vocab_size == len(RANKS) + 1


def test_ranks_are_read_from_tiktokens_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt2_ranks, "GPT2_NUM_RANKS", len(RANKS))
    path = write(tmp_path / "gpt2.tiktoken", RANKS)
    assert read_gpt2_ranks(path) == RANKS
    assert Tokenizer.load(path).encode(" abc") == [RANKS[b" abc"]]


def test_ranks_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "other.tiktoken", RANKS)
    with pytest.raises(
        InputError, match=rf"is not GPT-2's: it must have the 50256 ranks from 0, got {len(RANKS)} tokens"
    ):
        read_gpt2_ranks(path)


def test_broken_ranks_are_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "gpt2.tiktoken"
    for broken in ("IQ==", "IQ== one", "I! 1"):
        path.write_text(f"IQ== 0\n{broken}\n")
        with pytest.raises(InputError, match=r"gpt2\.tiktoken, line 2: not a token in base64 and its rank"):
            read_gpt2_ranks(path)
    with pytest.raises(InputError, match="cannot read the ranks"):
        read_gpt2_ranks(tmp_path / "none.tiktoken")


def test_ranks_without_the_merges_of_a_token_are_refused() -> None:
    with pytest.raises(InputError, match="no merges that lead to the token b'xyz'"):
        tokenizer_from_ranks(RANKS | {b"xyz": len(RANKS)}, END_OF_TEXT)
