from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors

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
