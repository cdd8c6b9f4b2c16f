from __future__ import annotations

import json
import platform
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from tinyexperts.data import corpora
from tinyexperts.data.corpora import CORPORA, NamedCorpus, corpus_to_fetch, open_corpus
from tinyexperts.data.document import Document
from tinyexperts.data.hub import HubCorpus
from tinyexperts.data.packages import PackageCorpus
from tinyexperts.data.standard_library import StandardLibraryCorpus
from tinyexperts.errors import InputError


def test_standard_library_has_its_modules_and_not_its_tests_or_packages() -> None:
    skipped: list[str] = []
    documents = {document.name: document.text for document in StandardLibraryCorpus().documents(skipped)}
    assert documents["json/decoder.py"] == Path(json.__file__).with_name("decoder.py").read_bytes().decode()
    parts = {part for name in documents for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert all(name.endswith(".py") for name in documents)
    assert len(documents) > 300
    assert sum(len(text) for text in documents.values()) > 5_000_000
    assert skipped == []


def test_standard_library_reports_a_module_that_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "old.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "notes.txt").write_text("not a module")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    skipped: list[str] = []
    assert [document.name for document in StandardLibraryCorpus().documents(skipped)] == ["good.py"]
    assert skipped == [f"{tmp_path / 'old.py'} is not UTF-8 text: the byte at offset 5 cannot be decoded"]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(InputError, match="no folder with its standard library"):
        list(StandardLibraryCorpus().documents([]))


def test_open_corpus_finds_the_standard_library() -> None:
    corpus = open_corpus("stdlib")
    assert next(islice(corpus.documents([]), 1)).name == "__future__.py"
    assert corpus.description() == {"kind": "stdlib", "python": platform.python_version()}
    with pytest.raises(InputError, match="hub_split is for data sets, and the corpus 'stdlib' has none: 'train'"):
        open_corpus("stdlib", hub_split="train")


def test_open_corpus_overrides_what_is_known_of_a_data_set() -> None:
    corpus = open_corpus("c4", hub_config="realnewslike")
    assert isinstance(corpus, HubCorpus)
    assert (corpus.path, corpus.config) == ("allenai/c4", "realnewslike")
    assert corpus.string_fields == ("text", "timestamp", "url")
    other = open_corpus("someone/some-text", text_field="body", hub_split="test")
    assert isinstance(other, HubCorpus)
    assert (other.path, other.text_field, other.split) == ("someone/some-text", "body", "test")
    curation = open_corpus("curation-corpus")
    assert isinstance(curation, HubCorpus)
    assert curation.text_field == "article_content"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitext103", r"unknown corpus 'wikitext103'; did you mean 'wikitext-103'\?"),
        ("C4", r"did you mean 'c4'\?"),
        ("xyzzy", ", ".join(CORPORA)),
        ("a/b/c", r"unknown corpus 'a/b/c'"),
    ],
)
def test_unknown_corpus_names_close_matches(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_corpus(name)


def test_unknown_corpus_that_is_a_path_says_how_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"it is a path: give it as --files {tmp_path}"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "prepared", "fetched"),
    [
        ("c4", "train", "validation"),
        ("wikitext-103", "train", "test"),
        ("pile", "train", "test"),
        ("curation-corpus", "train", "train"),
        ("lambada", "test", "test"),
    ],
)
def test_a_data_set_of_the_hub_is_prepared_from_one_split_and_fetched_from_the_held_out_one(
    name: str, prepared: str, fetched: str
) -> None:
    assert open_corpus(name).description()["split"] == prepared
    assert corpus_to_fetch(name).corpus.description()["split"] == fetched
    # Nothing else differs.
    assert open_corpus(name, hub_split=fetched) == corpus_to_fetch(name).corpus


def test_one_more_corpus_is_one_more_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Airports:
        def documents(self, skipped: list[str]) -> list[Document]:
            return [Document("HAM", "Hamburg")]

        def description(self) -> dict[str, str]:
            return {"kind": "harbors"}

    entry = NamedCorpus(corpus=Airports(), description="harbors", license="CC0", page="https://example.org")  # type: ignore[arg-type]
    monkeypatch.setattr(corpora, "CORPORA", {**CORPORA, "harbors": entry})
    assert list(open_corpus("harbors").documents([])) == [Document("HAM", "Hamburg")]
    assert corpus_to_fetch("harbors") is entry
    with pytest.raises(InputError, match=r"unknown corpus 'harbor'; did you mean 'harbors'\?"):
        open_corpus("harbor")
    with pytest.raises(InputError, match="text_field is for data sets, and the corpus 'harbors' has none: 'body'"):
        open_corpus("harbors", text_field="body")


def test_every_corpus_names_its_license_and_where_from() -> None:
    for name, entry in CORPORA.items():
        assert entry.license, name
        assert entry.page.startswith("https://"), name
        assert isinstance(entry.corpus, PackageCorpus) == (entry.megabytes is not None), name
        for file in entry.corpus.files if isinstance(entry.corpus, PackageCorpus) else ():
            assert file.url.startswith("https://")
            assert len(file.sha256) == 64
    assert {"stdlib", "c4", "wikitext-103", "pile", "curation-corpus", "lambada"} <= set(CORPORA)
