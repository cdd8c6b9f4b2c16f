"""The one tokenizer class of the project: byte-level BPE trained here, any existing tokenizer.json, or GPT-2's.

Text never becomes a special token: a document that spells `<|endoftext|>` is encoded as the characters it holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinyexperts.data.gpt2_ranks import read_gpt2_ranks, tokenizer_from_ranks
from tinyexperts.errors import InputError

END_OF_TEXT = "<|endoftext|>"
# How published tokenizers call the token between documents, the first that is present is taken.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_NUM_BYTES = 256


class Tokenizer:
    """Encodes text to token ids and back; `vocab_size` is one more than the highest id."""

    def __init__(self, tokenizer_json: str) -> None:
        """Make the tokenizer from the content of a tokenizer.json, which is kept as it is.

        Raises:
            InputError: not a tokenizer.json, or one without a token that ends a text.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # tokenizers raises no narrower class
            raise InputError(f"not a tokenizer.json: {error}") from error
        self._json = tokenizer_json
        self._tokenizer.encode_special_tokens = True
        # A tokenizer that was saved for batches of sentences may cut and pad, which would lose or invent text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = [self._tokenizer.token_to_id(name) for name in _END_OF_TEXT_NAMES]
        known_ids = [id_ for id_ in ids if id_ is not None]
        if not known_ids:
            raise InputError(
                f"the tokenizer has no token that ends a text; one of {', '.join(_END_OF_TEXT_NAMES)} is needed"
            )
        self.end_of_text_id: int = known_ids[0]
        # Not the number of tokens: published vocabularies have gaps, and an embedding needs a row for the highest id.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def hash(self) -> str:
        """The sha256 of the tokenizer.json, whatever its white space and the order of its keys."""
        canonical = json.dumps(json.loads(self._json), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without any special token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; faster than one at a time."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens by their names."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write the tokenizer.json."""
        Path(path).write_text(self._json, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json, or GPT-2's ranks where the name ends in .tiktoken.

        Raises:
            InputError: a file that cannot be read, or that is not what its name says.
        """
        path = Path(path)
        if path.suffix == ".tiktoken":
            return cls(tokenizer_from_ranks(read_gpt2_ranks(path), END_OF_TEXT).to_str())
        try:
            return cls(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except ValueError as error:  # InputError, and what is not UTF-8
            raise InputError(f"cannot use the tokenizer {path}: {error}") from error

    @classmethod
    def from_hub(cls, name: str = "gpt2") -> Tokenizer:
        """Fetch the tokenizer of a Hugging Face model.

        Raises:
            InputError: the hub cannot be reached, or has no such tokenizer.
        """
        try:
            return cls(tokenizers.Tokenizer.from_pretrained(name).to_str())
        except Exception as error:  # tokenizers raises no narrower class
            raise InputError(
                f"cannot fetch the tokenizer {name!r} from the Hugging Face hub, give the path of a tokenizer.json or "
                f"of gpt2.tiktoken instead: {' '.join(str(error).split())}"
            ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    The end-of-text token has id 0, the 256 bytes follow, then the merges, each of a pair that was seen at least twice.

    Raises:
        InputError: a vocabulary too small for the bytes, or larger than the texts support.
    """
    smallest = _NUM_BYTES + 1
    if vocab_size < smallest:
        raise InputError(f"vocab_size must be at least {smallest} (the bytes and {END_OF_TEXT}), got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise InputError(
            f"vocab_size must be at most {reached} for this text, which supports no more, got {vocab_size}"
        )
    return Tokenizer(tokenizer.to_str())
