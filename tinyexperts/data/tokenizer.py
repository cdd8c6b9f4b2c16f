"""The one tokenizer class of the project: byte-level BPE trained here, any existing tokenizer.json, or GPT-2's.

Text never becomes a control token: a document that spells `<|endoftext|>` is encoded as the characters it holds,
whether the tokenizer.json marks that entry as special, has it among its added words or only in the model's vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from tinyexperts.data.document import printable
from tinyexperts.data.gpt2_ranks import read_gpt2_ranks, tokenizer_from_ranks
from tinyexperts.errors import InputError

END_OF_TEXT = "<|endoftext|>"
# How published tokenizers call the token between documents, the first that is present is taken.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
# What published tokenizers call their other control tokens, where they don't mark them as special.
_CONTROL_NAME = re.compile(
    r"<\|[^|\s]*\w[^|\s]*\|>|</?(?:s|pad|unk|bos|eos|mask|sep|cls)>|\[(?:cls|sep|pad|unk|mask|bos|eos)\]", re.IGNORECASE
)
_NUM_BYTES = 256
# The library's training takes a word's length squared; no word of ordinary text is as long as DNA or padding.
_MOST_BYTES_IN_A_WORD = 1024


class Tokenizer:
    """An encoder of text to token ids and back; `vocab_size` is one more than the highest id."""

    def __init__(self, tokenizer_json: str) -> None:
        """Make the tokenizer from the content of a tokenizer.json, which is kept as it is.

        Raises:
            InputError: not a tokenizer.json, or one without a token that ends a text.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # tokenizers raises no narrower class
            raise InputError(f"not a tokenizer.json: {error}") from error
        self._json = tokenizer_json
        ids = [tokenizer.token_to_id(name) for name in _END_OF_TEXT_NAMES]
        known_ids = [id_ for id_ in ids if id_ is not None]
        if not known_ids:
            raise InputError(
                f"the tokenizer has no token that ends a text; one of {', '.join(_END_OF_TEXT_NAMES)} is needed"
            )
        self.end_of_text_id: int = known_ids[0]
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        # Not the number of tokens: published vocabularies have gaps, and an embedding needs a row for the highest id.
        self.vocab_size: int = max(vocabulary.values()) + 1
        content = json.loads(tokenizer.to_str())  # with every key, also those that older files lack
        self._tokenizer = _of_plain_text(tokenizer, content)
        special = {token["content"] for token in content["added_tokens"] if token["special"]}
        self._control_names: dict[int, str] = {
            id_: name
            for name, id_ in vocabulary.items()
            if len(name) > 1 and (name in special or _is_control_name(name))  # one character is that character
        }
        self._unknown_id = _unknown_id(content["model"], tokenizer)
        self._unknown_name = ""
        if self._unknown_id is not None and self._unknown_id != self.end_of_text_id:
            # Text that isn't known may become it; text that spells it may not, where the vocabulary can write it.
            name = self._control_names.pop(self._unknown_id, "")
            parts = self._tokenizer.encode_batch_fast([name[:1], name[1:]], add_special_tokens=False)
            if all(self._unknown_id not in part.ids for part in parts):
                self._unknown_name = name

    @property
    def hash(self) -> str:
        """The sha256 of the tokenizer.json, whatever its white space and the order of its keys."""
        canonical = json.dumps(json.loads(self._json), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without any control token.

        Raises:
            InputError: text that this tokenizer can only write as a control token.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; faster than one at a time.

        Raises:
            InputError: text that this tokenizer can only write as a control token.
        """
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        batch = [encoding.ids for encoding in encodings]
        return [
            self._encode_around_control_tokens(text) if self._has_control_token(text, ids) else ids
            for text, ids in zip(texts, batch, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, control tokens by their names."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def loses_text(self, texts: Sequence[str], ids: Sequence[list[int]]) -> list[bool]:
        """Say of each text whether decoding its ids, which lack the end-of-text token, gives another one."""
        decoded = self._tokenizer.decode_batch(ids, skip_special_tokens=False)
        return [text != back for text, back in zip(texts, decoded, strict=True)]

    @property
    def keeps_every_text(self) -> bool:
        """True if its parts show, without a text to try it on, that decoding gives every text back.

        Byte-level BPE that changes nothing before and after does; of any other tokenizer it is not known.
        """
        content = json.loads(self._tokenizer.to_str())
        model = content["model"]
        return (
            model["type"] == "BPE"
            and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
            and set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()
            and content["normalizer"] is None
            and _maps_bytes_only(content["pre_tokenizer"])
            and (content["decoder"] or {}).get("type") == "ByteLevel"
            and all(token["special"] for token in content["added_tokens"])
        )

    def _has_control_token(self, text: str, ids: list[int]) -> bool:
        is_unknown_spelled = self._unknown_name and self._unknown_name in text and self._unknown_id in ids
        return bool(is_unknown_spelled) or not self._control_names.keys().isdisjoint(ids)

    def _encode_around_control_tokens(self, text: str) -> list[int]:
        """Encode a text in pieces, cut within whatever became a control token."""
        ids: list[int] = []
        pieces, tokenizer = [text], self._tokenizer
        while pieces:
            piece = pieces.pop()
            encoding = tokenizer.encode(piece, add_special_tokens=False)
            cuts = []
            for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if id_ in self._control_names:
                    cuts.append(_cut_within(piece, start, end, self._control_names[id_]))
                elif id_ == self._unknown_id and self._unknown_name and self._unknown_name in piece[start:end]:
                    cuts.append(_cut_within(piece, start, end, self._unknown_name))
            if cuts:
                bounds = [0, *sorted(set(cuts)), len(piece)]
                pieces += [piece[first:last] for first, last in zip(bounds[-2::-1], bounds[:0:-1], strict=True)]
            else:
                ids += encoding.ids
                tokenizer = self._tokenizer_of_continued_text
        return ids

    @cached_property
    def _tokenizer_of_continued_text(self) -> tokenizers.Tokenizer:
        """The tokenizer without the parts that put a space before a text."""
        content = json.loads(self._tokenizer.to_str())
        content |= {name: _without_prefix(content[name]) for name in ("normalizer", "pre_tokenizer")}
        return _of_plain_text(tokenizers.Tokenizer.from_str(json.dumps(content)), content)

    @property
    def plain_json(self) -> str:
        """The content of a tokenizer.json that writes text in the same ids: all its control tokens are marked as such.

        A vocabulary with the name of one among its ordinary pieces, as Unigram models have, writes that name with it.
        """
        return self._tokenizer.to_str()

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
            raise InputError(f"cannot read the tokenizer {printable(path)}: {error.strerror}") from error
        except ValueError as error:  # InputError, and what is not UTF-8
            raise InputError(f"cannot use the tokenizer {printable(path)}: {error}") from error

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


def text_loss(num_lossy: int, num_documents: int, first: str = "") -> str:
    """Return the sentence that says why bits per byte are unknown.

    Args:
        num_lossy (int): the number of documents that the tokenizer changes.
        num_documents (int): the number of all documents.
        first (str): the name of the first of them, if it is known.
    """
    where = f" (the first: {first})" if first else ""
    return f"bits per byte are unknown: the tokenizer loses text in {num_lossy:,} of {num_documents:,} documents{where}"


def _of_plain_text(tokenizer: tokenizers.Tokenizer, content: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return a tokenizer that looks for no control token in its text, from one of the library and its content."""
    added_tokens = [
        token | {"special": token["special"] or _is_control_name(token["content"])} for token in content["added_tokens"]
    ]
    if added_tokens != content["added_tokens"]:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": added_tokens}))
    tokenizer.encode_special_tokens = True
    # A tokenizer that was saved for batches of sentences may cut and pad, which would lose or invent text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_control_name(name: str) -> bool:
    return name in _END_OF_TEXT_NAMES or _CONTROL_NAME.fullmatch(name) is not None


def _unknown_id(model: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> int | None:
    if model["type"] == "Unigram":
        unknown_id: int | None = model["unk_id"]
        return unknown_id
    return None if model["unk_token"] is None else tokenizer.token_to_id(model["unk_token"])


def _cut_within(text: str, start: int, end: int, name: str) -> int:
    """Return a place to cut a text, so that the piece from start to end no longer becomes a control token."""
    at = text.find(name, start, end)
    cut = at + 1 if at >= 0 else (start + end) // 2  # a changed spelling, or white space that the entry takes with it
    if not start < cut < end:
        raise InputError(
            f"the tokenizer writes the text {text[start:end]!r} as its control token {name!r}, no other way"
        )
    return cut


def _maps_bytes_only(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Return True if a pre-tokenizer splits text and writes its bytes as characters, and neither adds nor drops any."""
    if pre_tokenizer is None:
        return False
    *splits, last = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return (
        all(split["type"] == "Split" and split["behavior"] != "Removed" for split in splits)
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
    )


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer that puts nothing before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    if part["type"] == "Metaspace":
        return {name: value for name, value in part.items() if name != "add_prefix_space"} | {"prepend_scheme": "never"}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return part | {name: [kept for inner in part[name] if (kept := _without_prefix(inner)) is not None]}
    return part


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    The end-of-text token has id 0, the 256 bytes follow, then the merges, each of a pair that was seen at least twice.
    A word (a run of letters, of digits, of signs or of white space) of more than 1,024 bytes is learned from in parts.

    Args:
        texts (Iterable[str]): the texts, which are read once.
        vocab_size (int): the number of tokens.

    Raises:
        InputError: a vocabulary too small for the bytes, or larger than the texts support.
    """
    smallest = _NUM_BYTES + 1
    if vocab_size < smallest:
        raise InputError(f"vocab_size must be at least {smallest} (the bytes and {END_OF_TEXT}), got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts_of_words = pre_tokenizers.Split(Regex(f".{{{_MOST_BYTES_IN_A_WORD}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, parts_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise InputError(
            f"vocab_size must be at most {reached} for this text, which supports no more, got {vocab_size}"
        )
    return Tokenizer(tokenizer.to_str())
