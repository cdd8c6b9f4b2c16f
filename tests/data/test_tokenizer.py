from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tinyexperts.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from tinyexperts.errors import InputError

SENTENCES = [f"the router of token {i} chose expert {i * 7919 % 1009} by its query and keys\n" for i in range(300)]
STRANGE_TEXT = "日本語 é\u00a0🎉\r\n\t  a  <|endoftext|>b\x00\x7f"


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(SENTENCES, 320)


def test_trained_vocabulary_has_the_size_asked_for_with_end_of_text_first(trained: Tokenizer) -> None:
    assert trained.vocab_size == 320
    assert trained.end_of_text_id == 0
    assert trained.decode([0]) == END_OF_TEXT
    assert len(trained.encode(SENTENCES[0])) < len(SENTENCES[0].encode()) / 2


def test_training_is_deterministic(trained: Tokenizer, tmp_path: Path) -> None:
    assert train_tokenizer(iter(SENTENCES), 320).hash == trained.hash
    assert train_tokenizer(SENTENCES, 321).hash != trained.hash


def test_any_text_decodes_to_itself(trained: Tokenizer) -> None:
    for text in (STRANGE_TEXT, SENTENCES[5], " leading", "", "\n\n"):
        assert trained.decode(trained.encode(text)) == text
    assert trained.encode_batch([STRANGE_TEXT, "", "a"]) == [trained.encode(t) for t in (STRANGE_TEXT, "", "a")]


def test_text_never_becomes_the_special_token(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer.json")
    for tokenizer in (trained, Tokenizer.load(tmp_path / "tokenizer.json")):
        assert tokenizer.end_of_text_id not in tokenizer.encode(f"a{END_OF_TEXT}b")
        assert tokenizer.end_of_text_id not in tokenizer.encode_batch([END_OF_TEXT])[0]
        assert tokenizer.decode(tokenizer.encode(END_OF_TEXT)) == END_OF_TEXT


def test_saved_tokenizer_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.hash == trained.hash
    assert loaded.encode(STRANGE_TEXT) == trained.encode(STRANGE_TEXT)


def test_hash_is_of_the_content_and_not_of_the_layout(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert Tokenizer.load(path).hash == trained.hash
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path).hash != trained.hash


def test_vocabulary_larger_than_the_text_supports_names_what_was_reached() -> None:
    # Two words, each seen often: 1 special token, 256 bytes, and the merges ab and Ġab.
    with pytest.raises(InputError, match=r"vocab_size must be at most 259 for this text, .* got 300"):
        train_tokenizer(["ab ab ab"], 300)
    assert train_tokenizer(["ab ab ab"], 259).vocab_size == 259


def test_vocabulary_smaller_than_the_bytes_is_an_error() -> None:
    with pytest.raises(InputError, match=r"vocab_size must be at least 257 .* got 256"):
        train_tokenizer(SENTENCES, 256)


def test_published_tokenizer_adds_cuts_and_pads_nothing(tmp_path: Path) -> None:
    published = tokenizers.Tokenizer(
        models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<s>": 3, "</s>": 9}, unk_token="<unk>")
    )
    published.pre_tokenizer = pre_tokenizers.Whitespace()
    published.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    published.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 9)]
    )
    published.enable_truncation(2)
    published.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    published.save(str(path))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("a b a b") == [1, 2, 1, 2]
    assert tokenizer.encode_batch(["a b a b", "b"]) == [[1, 2, 1, 2], [2]]
    assert tokenizer.end_of_text_id == 9
    assert tokenizer.vocab_size == 10  # ids 4 to 8 have no token, and an embedding still needs their rows


def test_unusable_tokenizer_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*tokenizer\.json: No such file"):
        Tokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(InputError, match=r"cannot use the tokenizer .*tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot use the tokenizer"):
        Tokenizer.load(path)
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(InputError, match=r"no token that ends a text; one of <\|endoftext\|>, .*</s>"):
        Tokenizer.load(path)


def test_hub_that_cannot_be_reached_names_the_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    class Offline:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise Exception("request error:\n no network")  # what tokenizers raises has no class of its own

    monkeypatch.setattr(tokenizers, "Tokenizer", Offline)
    with pytest.raises(InputError, match=r"tokenizer 'gpt2' .* tokenizer\.json or of gpt2\.tiktoken instead: request"):
        Tokenizer.from_hub("gpt2")


def byte_level(added: list[AddedToken], prefix_space: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE whose model has no entry but bytes and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "ab", "</"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("<", "/")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    return tokenizer


def unigram(normalizer: Any = None) -> tokenizers.Tokenizer:
    """A Unigram with Metaspace whose vocabulary, and nothing else, holds control tokens."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<|endoftext|>", 0.0), ("<PAD>", -0.5)]
    letters = [(letter, -3.0 - i / 100) for i, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyzPADS<>/|")]
    tokenizer = tokenizers.Tokenizer(models.Unigram([*pieces, *letters], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    letters = [prefix + letter for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyzCLSEP[]</>"]
    vocabulary = {name: i for i, name in enumerate(["[UNK]", "[CLS]", "[SEP]", "</s>", *letters])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def words(unknown: str) -> tokenizers.Tokenizer:
    vocabulary = {"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4, "<|sep|>": 5}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def bpe_that_takes_whole_words() -> tokenizers.Tokenizer:
    vocabulary = {name: number for number, name in enumerate(["</s>", *"ab</s>"])}
    return tokenizers.Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))


UNMARKED = [AddedToken("</s>", special=False, normalized=False), AddedToken("<pad>", special=False, normalized=True)]
WITH_SPACE = [AddedToken("</s>", special=False, normalized=True, lstrip=True, rstrip=True)]


@pytest.mark.parametrize(
    ("make", "names", "keeps_text"),
    [
        (lambda: byte_level(UNMARKED), ["</s>", "<pad>"], True),
        (lambda: byte_level(WITH_SPACE), ["</s>"], True),
        (lambda: byte_level([AddedToken("<|im_end|>", special=False), *UNMARKED]), ["<|im_end|>", "</s>"], True),
        (lambda: unigram(), ["<s>", "</s>", "<|endoftext|>", "<PAD>", "<unk>"], True),
        (lambda: unigram(normalizers.Lowercase()), ["<s>", "</s>", "<|endoftext|>"], True),
        (word_pieces, ["[CLS]", "[SEP]", "</s>"], False),
        (lambda: words("<unk>"), ["</s>", "<pad>", "<|sep|>"], False),
        (bpe_that_takes_whole_words, ["</s>"], False),
    ],
)
def test_text_that_spells_a_control_token_never_becomes_it(
    make: Callable[[], tokenizers.Tokenizer], names: list[str], keeps_text: bool
) -> None:
    tokenizer = Tokenizer(make().to_str())
    control = {make().token_to_id(name) for name in names}
    assert None not in control
    for name in names:
        for text in (name, f"a{name}b", f"a {name} b", name * 3, f"{name[:1]}{name}{name[1:]}", f"   {name}  "):
            ids = tokenizer.encode(text)
            assert ids
            assert control.isdisjoint(ids), text
            assert tokenizer.encode_batch(["a", text]) == [tokenizer.encode("a"), ids]
            if keeps_text and not text.startswith(" "):
                assert tokenizer.decode(ids) == text


def test_a_changed_spelling_does_not_become_a_control_token_either() -> None:
    wide = "a\uff1c/s\uff1eb"  # full-width signs, which NFKC writes as </s>
    tokenizer = Tokenizer(unigram(normalizers.NFKC()).to_str())
    assert tokenizer.encode(wide) == tokenizer.encode("a</s>b")
    assert tokenizer.end_of_text_id not in tokenizer.encode(wide)
    lower = Tokenizer(unigram(normalizers.Lowercase()).to_str())
    assert lower.end_of_text_id not in lower.encode("a</S>b <|EndOfText|>")


def test_an_entry_that_is_not_marked_is_passed_over_as_a_marked_one_is() -> None:
    marked = byte_level([])
    marked.add_special_tokens(["</s>", "<pad>"])
    expected, found = Tokenizer(marked.to_str()), Tokenizer(byte_level(UNMARKED).to_str())
    for text in ("ab</s>ab", "<pad></s> <pad>", "</s"):
        assert found.encode(text) == expected.encode(text)


def test_words_that_the_author_added_stay_whole() -> None:
    added = [*UNMARKED, AddedToken("COVID-19", special=False), AddedToken("<tool_call>", special=False)]
    library = byte_level(added)
    tokenizer = Tokenizer(library.to_str())
    text = "ab COVID-19 <tool_call>ab"
    assert library.token_to_id("COVID-19") in tokenizer.encode(text)
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text + "</s>")[:-3] == library.encode(text).ids


def test_an_unknown_word_is_still_unknown() -> None:
    tokenizer = Tokenizer(words("<unk>").to_str())
    assert tokenizer.encode("a zzz <unk> b") == [3, 0, 0, 4]
    assert 0 in Tokenizer(unigram().to_str()).encode("a \u65e5 b")
    spelled_and_unknown = Tokenizer(unigram().to_str()).encode("<unk>\u65e5")
    assert spelled_and_unknown.count(0) == 1


def test_text_that_can_only_be_a_control_token_is_refused() -> None:
    tokenizer = Tokenizer(words("</s>").to_str())
    assert tokenizer.encode("a b") == [3, 4]
    with pytest.raises(
        InputError, match=r"the tokenizer writes the text 'z' as its control token '</s>', no other way"
    ):
        tokenizer.encode("a zz")


def test_a_character_that_is_marked_as_special_is_still_that_character() -> None:
    library = byte_level([AddedToken("</s>", special=True), AddedToken("a", special=True)])
    tokenizer = Tokenizer(library.to_str())
    assert tokenizer.encode("a") == [library.token_to_id("a")]
    assert tokenizer.decode(tokenizer.encode("xa a")) == "xa a"


def test_texts_of_a_tokenizer_keep_the_tokens_that_its_library_gives() -> None:
    for library in (byte_level(UNMARKED), byte_level([], prefix_space=True), unigram(), word_pieces()):
        if library.token_to_id("</s>") is None:
            library.add_special_tokens(["</s>"])
        tokenizer = Tokenizer(library.to_str())
        for text in ("ab abc  a", "", " ", "\n\na", "<s", "x < y / z >"):
            assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("change", "keeps"),
    [
        (lambda library: None, True),
        (lambda library: setattr(library, "normalizer", normalizers.NFC()), False),
        (lambda library: setattr(library, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
        (lambda library: setattr(library, "decoder", decoders.WordPiece()), False),
        (lambda library: library.add_tokens([AddedToken("word", lstrip=True, special=False)]), False),
        (
            lambda library: setattr(
                library,
                "pre_tokenizer",
                pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
                ),
            ),
            True,
        ),
        (
            lambda library: setattr(
                library,
                "pre_tokenizer",
                pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False)]),
            ),
            False,
        ),
    ],
)
def test_what_keeps_every_text_is_seen_from_its_parts(change: Callable[[Any], None], keeps: bool) -> None:
    library = byte_level(UNMARKED)
    change(library)
    tokenizer = Tokenizer(library.to_str())
    assert tokenizer.keeps_every_text == keeps
    texts = [STRANGE_TEXT, "", " a word", "a</s>b", "E\u0301"]
    lost = tokenizer.loses_text(texts, tokenizer.encode_batch(texts))
    assert any(lost) != keeps
    assert not Tokenizer(unigram().to_str()).keeps_every_text
    assert not Tokenizer(words("<unk>").to_str()).keeps_every_text


def long_words(num_characters: int) -> dict[str, str]:
    """Text of one or few "words" as long as it is itself."""
    draw = random.Random(0)
    return {
        "letter": "a" * num_characters,
        "pair": "ab" * (num_characters // 2),
        "spaces": " " * num_characters,
        "newlines": "\n" * num_characters,
        "dna": "".join(draw.choices("ACGT", k=num_characters)),
        "digits": "".join(draw.choices("0123456789", k=num_characters)),
        "signs": "".join(draw.choices("!?.,;:=-(){}", k=num_characters)),
        "base64": base64.b64encode(draw.randbytes(num_characters * 3 // 4)).decode(),
        "minified": "".join(
            draw.choices(["function(a,b){", "return a+b}", "var x=y;", "if(c)"], k=num_characters // 10)
        ),
        "emoji": "\U0001f389" * (num_characters // 4),
        "cjk": "\u65e5\u672c" * (num_characters // 6),
    }


def test_one_long_word_takes_a_time_that_grows_with_its_length() -> None:
    """In a process of its own, as training can't be interrupted: quadratic, it takes minutes for these."""
    program = (
        "from tests_tokenizer import long_words, SENTENCES\n"
        "from tinyexperts.data.tokenizer import train_tokenizer\n"
        "for name, text in long_words(250_000).items():\n"
        "    tokenizer = train_tokenizer([text, *SENTENCES], 300)\n"
        "    assert tokenizer.decode(tokenizer.encode(text)) == text, name\n"
    )
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('tests_tokenizer', {__file__!r})\n"
        "sys.modules['tests_tokenizer'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
    )
    subprocess.run([sys.executable, "-c", load + program], check=True, timeout=60)


@pytest.mark.parametrize("kind", long_words(12))
def test_a_long_word_is_learned_from_in_parts_and_encoded_whole(kind: str) -> None:
    text = long_words(20_000)[kind]
    tokenizer = train_tokenizer([text, *SENTENCES], 300)
    longest = max(map(len, json.loads(tokenizer._json)["model"]["vocab"]))
    assert longest <= 1024
    for changed in (text, f" {text}", f"x{text}y", text[:-1]):
        ids = tokenizer.encode(changed)
        assert tokenizer.decode(ids) == changed
        assert tokenizer.encode_batch([changed, "a"]) == [ids, tokenizer.encode("a")]
    assert len(tokenizer.encode(text)) < len(text.encode())


def test_words_up_to_the_bound_are_learned_from_whole() -> None:
    assert train_tokenizer(SENTENCES, 320).hash == train_by_the_library(SENTENCES, 320).hash
    # xx, xxxx, ... and x 1,024 times: ten merges.
    at_bound = ["x" * 1024] * 2
    assert train_tokenizer(at_bound, 267).hash == train_by_the_library(at_bound, 267).hash
    beyond = ["x" * 1025] * 2
    assert train_by_the_library(beyond, 268).encode(beyond[0]) == [267]
    assert train_tokenizer(beyond, 267).encode(beyond[0]) == [266, train_tokenizer(beyond, 267).encode("x")[0]]


def train_by_the_library(texts: list[str], vocab_size: int) -> Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return Tokenizer(library.to_str())
