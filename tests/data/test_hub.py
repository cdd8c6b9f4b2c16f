from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pytest

from tinyexperts.data.corpora import CORPORA
from tinyexperts.data.hub import HubCorpus, join_wikitext_articles
from tinyexperts.errors import InputError


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def known(name: str) -> HubCorpus:
    corpus = CORPORA[name].corpus
    assert isinstance(corpus, HubCorpus)
    return corpus


def local(corpus: HubCorpus, tmp_path: Path, rows: list[dict[str, object]]) -> HubCorpus:
    """Return a corpus with the hub's files replaced by a local one."""
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(corpus, path="json", config=None, data_files={corpus.split: str(path)})


@pytest.mark.parametrize("name", ["pile", "curation-corpus", "lambada"])
def test_known_data_set_yields_its_text_field(tmp_path: Path, name: str) -> None:
    corpus = local(
        known(name), tmp_path, [{known(name).text_field: text, "other": 1} for text in ("one", "two\n", "三")]
    )
    assert [document.text for document in corpus.documents([])] == ["one", "two\n", "三"]
    assert [document.name for document in corpus.documents([])] == ["json:0", "json:1", "json:2"]


@pytest.mark.parametrize(("timestamp", "last"), [("2019-04-25T12:57:54Z", ""), (None, "2019-04-25T12:57:54Z")])
def test_c4_survives_timestamps_that_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timestamp: str | None, last: str
) -> None:
    rows: list[dict[str, object]] = [{"text": f"text {i}", "timestamp": timestamp, "url": "u"} for i in range(3000)]
    rows.append({"text": "last", "timestamp": last, "url": "u"})
    corpus = local(known("c4"), tmp_path, rows)
    # Blocks of 16 KB, so that the types are settled before the last row is seen.
    monkeypatch.setattr(datasets, "load_dataset", partial(datasets.load_dataset, chunksize=16 << 10))
    assert [document.text for document in corpus.documents([])][-2:] == ["text 2999", "last"]
    with pytest.raises(InputError, match="cannot read the data set json"):
        list(replace(corpus, string_fields=()).documents([]))


def test_wikitext_lines_are_joined_to_articles(tmp_path: Path) -> None:
    lines = ["", " = First = \n", "", " text , one \n", "", " = = Section = = \n", "", " = Second = \n", "", " more \n"]
    corpus = local(known("wikitext-103"), tmp_path, [{"text": line} for line in lines])
    assert [document.text for document in corpus.documents([])] == [
        "\n = First = \n\n text , one \n\n = = Section = = \n\n",
        " = Second = \n\n more \n",
    ]


def test_join_wikitext_articles_takes_no_equation_for_a_title() -> None:
    lines = iter([" = Title = \n", "", " where \n", " = x + y = \n", " and so on \n"])
    assert len(list(join_wikitext_articles(lines))) == 1


def test_null_text_is_an_empty_document_and_other_types_are_errors(tmp_path: Path) -> None:
    corpus = HubCorpus(path="any/name", text_field="body")
    texts = local(corpus, tmp_path, [{"body": None}, {"body": "x"}])
    assert [document.text for document in texts.documents([])] == ["", "x"]
    with pytest.raises(InputError, match="row 0: the field 'body' must be a string, got a int"):
        list(local(corpus, tmp_path, [{"body": 3}]).documents([]))
    with pytest.raises(InputError, match="row 0: no field 'body'; the fields are 'text', 'id'"):
        list(local(corpus, tmp_path, [{"text": "x", "id": 1}]).documents([]))


def test_rows_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*args: object, **options: object) -> Iterator[dict[str, str]]:
        assert options["streaming"] is True
        yield {"text": "first"}
        raise OSError("the line went dead")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    documents = HubCorpus(path="any/name").documents([])
    assert next(documents).text == "first"
    with pytest.raises(InputError, match=r"cannot read the data set any/name .*the line went dead"):
        next(documents)


def test_missing_split_or_data_set_is_one_sentence(tmp_path: Path) -> None:
    corpus = local(known("pile"), tmp_path, [{"text": "x"}])
    with pytest.raises(InputError, match=r"cannot read the data set json .*split tset") as error:
        list(replace(corpus, split="tset").documents([]))
    assert "\n" not in str(error.value)


def test_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot read the data set allenai/c4 \(config en, split train\): ") as error:
        list(known("c4").documents([]))
    assert "\n" not in str(error.value)


def test_missing_datasets_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tinyexperts\[data\]'"):
        list(known("c4").documents([]))


def test_description_says_what_was_read() -> None:
    assert known("c4").description() == {
        "kind": "hub",
        "path": "allenai/c4",
        "config": "en",
        "split": "train",
        "text_field": "text",
    }
