"""GPT-2's byte-pair encoding from the ranks that tiktoken publishes (gpt2.tiktoken), as a tokenizer of `tokenizers`.

Each line of a ranks file has a token's bytes in base64 and its rank, which is the token's id and the order in which
it was merged. The merges are not in the file: splitting each token with the merges that came before it recovers them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tinyexperts.data.document import printable
from tinyexperts.errors import InputError

# Ranks in gpt2.tiktoken (r50k_base); GPT-2's vocabulary is these and <|endoftext|>.
GPT2_NUM_RANKS = 50_256


def read_gpt2_ranks(path: Path) -> dict[bytes, int]:
    """Read a ranks file of tiktoken.

    Raises:
        InputError: a file that cannot be read, a broken line, or the ranks of another model, whose text is split by
            another pattern.
    """
    ranks: dict[bytes, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
                except ValueError as error:
                    raise InputError(f"{printable(path)}, line {number}: not a token in base64 and its rank") from error
    except OSError as error:
        raise InputError(f"cannot read the ranks {printable(path)}: {error.strerror}") from error
    if sorted(ranks.values()) != list(range(GPT2_NUM_RANKS)):
        raise InputError(
            f"{printable(path)} is not GPT-2's: it must have the {GPT2_NUM_RANKS} ranks from 0, got {len(ranks)} tokens"
        )
    return ranks


def tokenizer_from_ranks(ranks: Mapping[bytes, int], end_of_text: str) -> tokenizers.Tokenizer:
    """Return the byte-level BPE of these ranks, split by GPT-2's pattern, with the end-of-text token as the last id.

    Args:
        ranks (Mapping[bytes, int]): each token's bytes and its id, from 0; all 256 single bytes are among them.
        end_of_text (str): the name of the end-of-text token.
    """
    characters = _byte_characters()
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _split_by_earlier_merges(token, ranks)
            merges.append((_as_characters(left, characters), _as_characters(right, characters)))
    vocabulary = {_as_characters(token, characters): rank for token, rank in ranks.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return tokenizer


def _split_by_earlier_merges(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts that the merges of lower rank leave of a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= ranks[token]:
            raise InputError(f"the ranks hold no merges that lead to the token {token!r}")
        at = pair_ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_characters() -> list[str]:
    """Return the character that `tokenizers` writes for each byte: printable Latin-1 as itself, others from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def _as_characters(token: bytes, characters: list[str]) -> str:
    return "".join(characters[byte] for byte in token)
