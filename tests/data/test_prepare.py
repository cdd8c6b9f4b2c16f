from __future__ import annotations

import gzip
import json
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from tinyexperts.data import EncodedText, FileCorpus, PrepareConfig, TokenDataset, prepare, train_tokenizer
from tinyexperts.errors import InputError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(folder: Path, split: Any) -> list[str]:
    dataset = TokenDataset.open(folder)
    tokens = dataset.split(split)
    return [dataset.tokenizer.decode(tokens.document(i)[:-1]) for i in range(tokens.num_documents)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of_repeated_words(num_texts: int) -> list[str]:
    return [f"text {i}: the router asks expert {i % 7} for its score\n" for i in range(num_texts)]


@pytest.fixture
def small_file_limit() -> Iterator[int]:
    """The system refuses to write files beyond this, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield 50_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_same_preparation_gives_the_same_bytes(small_corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(PrepareConfig(files=(small_corpus,), output=tmp_path / name, vocab_size=300, validation_fraction=0.1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {
        "index.json",
        "tokenizer.json",
        "train-00000.bin",
        "train-documents.npy",
        "validation-00000.bin",
        "validation-documents.npy",
    }
    prepare(PrepareConfig(files=(small_corpus,), output=tmp_path / "three", vocab_size=300, seed=1))
    assert contents(tmp_path / "three")["train-00000.bin"] != contents(tmp_path / "one")["train-00000.bin"]


def test_paths_may_be_strings(small_corpus: Path, tmp_path: Path) -> None:
    summary = prepare(
        PrepareConfig(files=[str(small_corpus)], output=str(tmp_path / "set"), vocab_size=300)  # type: ignore[arg-type]
    )
    assert summary.folder == tmp_path / "set"
    dataset = TokenDataset.open(str(tmp_path / "set"))  # type: ignore[arg-type]
    text = EncodedText([str(small_corpus)], dataset.tokenizer)  # type: ignore[list-item]
    assert text.num_documents == 40
    alone = PrepareConfig(files=str(small_corpus), output=str(tmp_path / "b"))  # type: ignore[arg-type]
    assert alone.files == (small_corpus,)
    for one in (small_corpus, str(small_corpus)):  # one path in place of several
        assert EncodedText(one, dataset.tokenizer).num_documents == 40
        assert len(list(FileCorpus(one).documents([]))) == 40


def test_no_document_is_in_both_splits_and_every_one_in_one(tmp_path: Path) -> None:
    texts = texts_of_repeated_words(200)
    doubled = texts + [f"  {text} " for text in texts] + ["", " \n"]
    path = write_lines(tmp_path / "a.jsonl", doubled)
    summary = prepare(PrepareConfig(files=(path,), output=tmp_path / "set", vocab_size=300, validation_fraction=0.2))
    train, validation = (documents_of(tmp_path / "set", split) for split in ("train", "validation"))
    assert len(validation) == 40
    assert sorted(train + validation) == sorted(texts)
    assert (summary.index.num_duplicates_removed, summary.index.num_empty_removed) == (200, 2)


def test_tokenizer_is_trained_on_the_training_documents_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts_of_repeated_words(100))
    prepare(PrepareConfig(files=(path,), output=tmp_path / "set", vocab_size=290, validation_fraction=0.5))
    dataset = TokenDataset.open(tmp_path / "set")
    train = documents_of(tmp_path / "set", "train")
    assert dataset.tokenizer.hash == train_tokenizer(train, 290).hash
    assert dataset.tokenizer.hash != train_tokenizer(texts_of_repeated_words(100), 290).hash


def test_summary_and_index_count_what_was_made(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [*texts_of_repeated_words(30), texts_of_repeated_words(1)[0], ""])
    (folder / "b.txt.gz").write_bytes(gzip.compress("grüße\n".encode()))
    (folder / "c.png").write_bytes(b"\0")
    summary = prepare(PrepareConfig(files=(folder,), output=tmp_path / "set", vocab_size=280, seed=3))
    dataset = TokenDataset.open(tmp_path / "set")
    index = dataset.index
    assert (index.num_duplicates_removed, index.num_empty_removed, index.num_files_skipped) == (1, 1, 1)
    assert (index.seed, index.validation_fraction, index.vocab_size, index.dtype) == (3, 0.05, 280, "uint16")
    assert index.corpus == {"kind": "files", "paths": str(folder), "text_field": "text"}
    assert {name: record.num_documents for name, record in summary.index.splits.items()} == {
        "train": 29,
        "validation": 2,
    }
    texts = [*texts_of_repeated_words(30), "grüße\n"]
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(dataset.tokenizer.encode(text)) + 1 for text in texts)
    assert summary.bytes_per_token == num_bytes / num_tokens
    assert sum(dataset.split(name).num_bytes for name in ("train", "validation")) == num_bytes
    assert "left out: 1 duplicates, 1 empty documents, 1 files (the first: " in str(summary)
    assert "c.png is binary" in str(summary)


def test_existing_tokenizer_is_used_as_it_is(small_dataset: TokenDataset, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["one text <|endoftext|> within", "another"])
    tokenizer = small_dataset.folder / "tokenizer.json"
    prepare(PrepareConfig(files=(path,), output=tmp_path / "set", tokenizer=str(tokenizer)))
    dataset = TokenDataset.open(tmp_path / "set")
    assert dataset.tokenizer.hash == small_dataset.tokenizer.hash
    texts = documents_of(tmp_path / "set", "train") + documents_of(tmp_path / "set", "validation")
    assert sorted(texts) == ["another", "one text <|endoftext|> within"]
    num_ends = sum((dataset.split(name).tokens[:] == 0).sum() for name in ("train", "validation"))
    assert num_ends == 2


def test_limits_stop_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, ["aaaa", "aaaa", "bbbb", "cccc"])
    with path.open("a") as file:
        file.write("never reached, hence never an error\n")
    prepare(PrepareConfig(files=(path,), output=tmp_path / "two", vocab_size=257, max_documents=2))
    assert sorted(documents_of(tmp_path / "two", "train") + documents_of(tmp_path / "two", "validation")) == [
        "aaaa",
        "bbbb",
    ]
    prepare(PrepareConfig(files=(path,), output=tmp_path / "bytes", vocab_size=257, max_bytes=11))
    assert TokenDataset.open(tmp_path / "bytes").split("train").num_bytes == 4
    with pytest.raises(InputError, match="has no text within max_bytes 3"):
        prepare(PrepareConfig(files=(path,), output=tmp_path / "none", max_bytes=3))


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, small_file_limit: int) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(str(number) * (small_file_limit // 4))
    with pytest.raises(InputError, match=r"cannot write .*set, nothing of it is kept: File too large"):
        prepare(PrepareConfig(files=(folder,), output=tmp_path / "set", vocab_size=257))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, r"the corpus has no text \(kind files, paths .*a\.jsonl"),
        (["", " "], {}, "the corpus has no text"),
        (["just one", "just  one"], {}, "the validation split would be empty"),
        (["one", "two"], {"vocab_size": 400}, r"vocab_size must be at most \d+ for this text"),
        (["one", "two"], {"text_field": "body"}, r"a\.jsonl, line 1: no field 'body'; the fields are 'text'"),
        (["one", "two"], {"tokenizer": "nowhere.json"}, r"cannot read the tokenizer nowhere\.json"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, texts: list[str], options: dict[str, Any], message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(InputError, match=message) as error:
        prepare(PrepareConfig(files=(path,), output=tmp_path / "set", **options))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_existing_folder_is_refused_before_anything_is_read(small_dataset: TokenDataset, tmp_path: Path) -> None:
    before = contents(small_dataset.folder)
    path = tmp_path / "a.jsonl"
    path.write_text("broken")
    with pytest.raises(InputError, match="small exists; choose another name or delete it"):
        prepare(PrepareConfig(files=(path,), output=small_dataset.folder))
    assert contents(small_dataset.folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "c4", "files": (Path("a"),)}, "give either a corpus or files, got corpus 'c4' and 1 files"),
        ({"files": (Path("a"),), "hub_config": "en"}, "hub_config is for Hugging Face data sets"),
        ({"tokenizer": "gpt2", "vocab_size": 300}, "vocab_size is for a tokenizer that is trained, and gpt2 exists"),
        ({"validation_fraction": 0.0}, "validation_fraction must be above 0 and below 1, got 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be above 0 and below 1, got 1.0"),
        ({"max_documents": 0}, "max_documents must be positive, got 0"),
        ({"max_bytes": -1}, "max_bytes must be positive, got -1"),
    ],
)
def test_config_that_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PrepareConfig(**options)


def test_output_folder_is_named_after_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PrepareConfig().output_folder() == Path("data/stdlib")
    assert PrepareConfig(corpus="owner/name").output_folder() == Path("data/owner--name")
    assert PrepareConfig(files=(Path("some/books"), Path("b"))).output_folder() == Path("data/books")
    monkeypatch.chdir(tmp_path)
    assert PrepareConfig(files=(Path("texts/../mine"),)).output_folder() == Path("data", "mine")
    assert PrepareConfig(output=Path("x")).output_folder() == Path("x")


def test_an_output_in_the_input_is_refused(small_corpus):
    with pytest.raises(InputError, match="is inside the input"):
        prepare(PrepareConfig(files=(small_corpus,), output=small_corpus / "data"))
    assert not (small_corpus / "data").exists()


@pytest.mark.parametrize("parts", [(), ("link",)])
def test_an_output_in_the_input_by_a_link_is_refused(tmp_path: Path, parts: tuple[str, ...]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a")
    (texts / "link").symlink_to(tmp_path)
    sets = tmp_path.joinpath("texts", *parts) if parts else tmp_path
    with pytest.raises(InputError, match=r"the output .*set is inside the input .*texts"):
        prepare(PrepareConfig(files=(texts,), output=sets / "set"))
    assert not (tmp_path / "set").exists()


def test_documents_that_the_tokenizer_changes_are_counted_and_their_bytes_unknown(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, **{word: 2 + i for i, word in enumerate("abcdefghij")}}
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "words.json"))
    kept = [f"a {word}" for word in "abcdefghij"]
    for name, lost in (("kept", []), ("lost", ["unknown word", "a  b c", "b c\n"])):
        path = write_lines(tmp_path / f"{name}.jsonl", kept + lost)
        summary = prepare(
            PrepareConfig(
                files=(path,), output=tmp_path / name, tokenizer=str(tmp_path / "words.json"), validation_fraction=0.5
            )
        )
        dataset = TokenDataset.open(tmp_path / name)
        num_lossy = 0
        for split in ("train", "validation"):
            texts = documents_of(tmp_path / name, split)
            record, tokens = dataset.index.splits[split], dataset.split(split)
            # Each text that is lost decodes to another number of bytes.
            num_changed = sum(len(text) != tokens.documents[number, 1] for number, text in enumerate(texts))
            assert record.num_lossy_documents == num_changed
            assert record.num_bytes == tokens.documents[:, 1].sum()
            assert tokens.num_bytes == (None if num_changed else record.num_bytes)
            num_lossy += num_changed
        assert num_lossy == len(lost)
        sentence = f"bits per byte are unknown: the tokenizer loses text in 3 of {len(kept) + 3} documents"
        assert (sentence in str(summary)) == bool(lost)


def test_a_tokenizer_that_lowers_case_loses_only_what_has_capitals(tmp_path: Path, small_dataset: TokenDataset) -> None:
    library = tokenizers.Tokenizer.from_file(str(small_dataset.folder / "tokenizer.json"))
    library.normalizer = normalizers.Lowercase()
    library.save(str(tmp_path / "lower.json"))
    path = write_lines(tmp_path / "a.jsonl", ["small", "Large", "small too"])
    prepare(PrepareConfig(files=(path,), output=tmp_path / "set", tokenizer=str(tmp_path / "lower.json")))
    records = TokenDataset.open(tmp_path / "set").index.splits
    assert sum(record.num_lossy_documents or 0 for record in records.values()) == 1


def test_names_that_are_not_utf8_do_not_stop_a_preparation(tmp_path: Path, run_cli) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for number, text in enumerate(texts_of_repeated_words(20)):
        (folder / os.fsdecode(b"text\xff%d.txt" % number)).write_text(text)
    (folder / os.fsdecode(b"picture\xff.png")).write_bytes(b"\0")
    output = tmp_path / os.fsdecode(b"set\xe9")
    code, out, err = run_cli("data", "prepare", "--files", folder, "--output", output, "--vocab-size", 270)
    assert code == 0, err
    assert rf"{tmp_path}/set\xe9: vocabulary 270" in out
    assert rf"(the first: {tmp_path}/caf\xe9/picture\xff.png is binary" in out
    dataset = TokenDataset.open(output)
    assert dataset.index.corpus["paths"] == rf"{tmp_path}/caf\xe9"
    assert sorted(documents_of(output, "train") + documents_of(output, "validation")) == sorted(
        texts_of_repeated_words(20)
    )
    code, out, err = run_cli("data", "verify", output)
    assert code == 0, err
    assert rf"{tmp_path}/set\xe9 is whole" in out
    code, out, err = run_cli("data", "prepare", "--files", folder, "--output", output)
    assert (code, out) == (2, "")
    assert rf"{tmp_path}/set\xe9 exists; choose another name" in err
    (output / "train-00000.bin").unlink()
    code, out, err = run_cli("data", "verify", output)
    assert (code, out) == (2, "")
    assert rf"the data set is incomplete: {tmp_path}/set\xe9/train-00000.bin is missing" in err


@pytest.mark.parametrize("name", [b"none\xff.txt", b"broken\xff.jsonl", b"broken\xff.parquet", b"broken\xff.gz"])
def test_errors_about_names_that_are_not_utf8_can_be_printed(tmp_path: Path, run_cli, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    if not name.startswith(b"none"):
        path.write_text("broken")
    code, out, err = run_cli("data", "prepare", "--files", path, "--output", tmp_path / "set")
    assert (code, out) == (2, "")
    assert f"{tmp_path}/{name.decode('utf-8', 'backslashreplace')}" in err
    assert "Traceback" not in err


def test_linked_folders_and_every_name_of_json_lines_are_prepared(tmp_path: Path) -> None:
    texts = texts_of_repeated_words(40)
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for number, suffix in enumerate((".ndjson", ".jsonlines", ".json", ".jsonl")):
        write_lines((folder, elsewhere)[number % 2] / f"part{number}{suffix}", texts[number * 10 : number * 10 + 10])
    (folder / "linked").symlink_to(elsewhere)
    prepare(PrepareConfig(files=(folder,), output=tmp_path / "set", vocab_size=280))
    assert sorted(documents_of(tmp_path / "set", "train") + documents_of(tmp_path / "set", "validation")) == sorted(
        texts
    )


def test_one_long_word_among_the_texts_ends(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts_of_repeated_words(20)):
        (folder / f"{number}.txt").write_text(text)
    for name, text in (("letters", "A" * 1_000_000), ("spaces", "x" + " " * 1_000_000)):
        (folder / f"{name}.txt").write_text(text)
    prepare(PrepareConfig(files=(folder,), output=tmp_path / "set", vocab_size=290))
    lengths = sorted(map(len, documents_of(tmp_path / "set", "train") + documents_of(tmp_path / "set", "validation")))
    assert lengths[-2:] == [1_000_000, 1_000_001]
