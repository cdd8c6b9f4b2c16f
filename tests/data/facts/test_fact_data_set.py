"""Data sets of facts: what a preparation writes, and how it is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, trainers

from tinyexperts.data import PrepareConfig, TokenDataset, prepare
from tinyexperts.data.facts.statements import make_statements
from tinyexperts.data.facts.table import read_fact_table
from tinyexperts.errors import InputError

SPLITS = ("train", "validation", "unseen-phrasing", "unseen-entities")


def write_table(path: Path, num_entities: int = 60) -> Path:
    colors = ("rot", "grün", "blau")
    rows = [f"Stadt {number},{colors[number % 3]},{number * 37 % 101}" for number in range(num_entities)]
    path.write_text("\n".join(["name,color,size", *rows, rows[0], "Ohne,,"]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("facts")
    table = write_table(folder / "cities.csv")
    prepare(PrepareConfig(facts=table, key="name", output=folder / "cities", vocab_size=380, seed=3))
    return TokenDataset.open(folder / "cities")


def test_each_document_is_the_statement_of_the_fact_that_its_row_names(facts: TokenDataset) -> None:
    num_documents = 0
    for name in SPLITS:
        split = facts.split(name)  # type: ignore[arg-type]
        assert split.facts is not None
        fact_set = split.facts.fact_set
        keys = list(fact_set.entities)
        for number, (entity, attribute, phrasing, start) in enumerate(split.facts.rows.tolist()):
            key, column = keys[entity], fact_set.attributes[attribute]
            value = fact_set.entities[key][column]
            ids = split.document(number)[:-1].tolist()
            sentence = fact_set.phrasings[column][phrasing]
            assert facts.tokenizer.decode(ids) == sentence.replace("{key}", key).replace("{value}", value)
            assert facts.tokenizer.decode(ids[:start]) == sentence.partition(" {value}")[0].replace("{key}", key)
            assert facts.tokenizer.decode(ids[start:]).startswith(f" {value}")
            num_documents += 1
    assert num_documents == sum(record.num_documents for record in facts.index.splits.values())
    assert [split.name for split in facts.held_out_splits] == list(SPLITS[1:])


def test_what_the_table_lacks_is_counted(facts: TokenDataset) -> None:
    split = facts.split("train")
    assert split.facts is not None
    fact_set = split.facts.fact_set
    assert str(fact_set) == (
        "61 entities with facts: 60 of color, 60 of size; 2 empty cells, 1 rows that repeat one, 0 rows without a key"
    )
    assert fact_set.value_counts("color") == {"rot": 20, "grün": 20, "blau": 20}


def test_the_statements_are_those_of_the_seed(facts: TokenDataset, tmp_path: Path) -> None:
    table = read_fact_table(write_table(tmp_path / "cities.csv"), key="name")
    from tinyexperts.data.facts.phrasings import default_phrasings

    phrasings = {name: default_phrasings(name) for name in table.attributes}
    made = make_statements(table, phrasings, seed=3, held_out_fraction=0.05)
    for name in SPLITS:
        split = facts.split(name)  # type: ignore[arg-type]
        texts = [facts.tokenizer.decode(split.document(number)[:-1]) for number in range(split.num_documents)]
        assert texts == [statement.text for statement in made if statement.split == name]


def test_airports_are_a_corpus_without_a_download(tmp_path: Path) -> None:
    config = PrepareConfig(corpus="airports", max_entities=50, vocab_size=400, output=tmp_path / "airports")
    summary = prepare(config)
    assert config.output_folder() == tmp_path / "airports"
    assert "unseen-entities" in str(summary)
    assert summary.index.corpus["table"] == "airportsdata"
    dataset = TokenDataset.open(tmp_path / "airports")
    facts = dataset.split("validation").facts
    assert facts is not None
    assert facts.fact_set.attributes == ("city", "ICAO code", "name", "elevation", "time zone")
    assert len(facts.fact_set.entities) == 50


@pytest.mark.parametrize("file", ["facts.json", "train-facts.npy", "unseen-entities-facts.npy"])
def test_a_damaged_file_of_facts_is_found(facts: TokenDataset, tmp_path: Path, file: str) -> None:
    for path in facts.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / file).read_bytes())
    content[-2] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(file)):
        TokenDataset.open(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match=rf"incomplete.*{re.escape(file)}"):
        TokenDataset.open(tmp_path)


def test_rows_of_facts_of_another_shape_are_refused(facts: TokenDataset, tmp_path: Path) -> None:
    for path in facts.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    np.save(tmp_path / "validation-facts.npy", np.zeros((3, 4), dtype=np.int32))
    with pytest.raises(InputError, match=r"validation-facts.npy must be int32 \[\d+, 4\], got int32 \[3, 4\]"):
        TokenDataset.open(tmp_path, verify=False)


def test_the_splits_of_facts_do_not_change_the_identity_of_other_data_sets(facts: TokenDataset) -> None:
    content = json.loads((facts.folder / "index.json").read_text())
    assert set(content["splits"]) == set(SPLITS)
    assert content["facts"]["file"] == "facts.json"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"facts": Path("t.csv")}, "key must be the column of t.csv that names the entities, got none"),
        ({"key": "a"}, "key is for a table of facts, and none was given: a"),
        ({"phrasings": Path("p.toml")}, "phrasings is for a table of facts, and none was given: p.toml"),
        ({"corpus": "stdlib", "attributes": ("a",)}, "attributes is for a table of facts"),
        ({"corpus": "airports", "key": "a"}, "key is for a table of facts, and none was given: a"),
        ({"corpus": "airports", "attributes": ("city", "city")}, "attributes must be different, got city, city"),
        ({"facts": Path("t.csv"), "key": "a", "corpus": "stdlib"}, "give one of a corpus, files and facts"),
        ({"facts": Path("t.csv"), "key": "a", "max_bytes": 3}, "max_bytes is for texts, and facts have max_entities"),
        ({"max_entities": 3}, "max_entities is for facts, and there are none, got 3"),
        ({"corpus": "airports", "max_entities": 0}, "max_entities must be positive, got 0"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        PrepareConfig(**options)


def test_no_token_before_an_answer_holds_a_part_of_its_value(tmp_path: Path) -> None:
    """A tokenizer whose tokens run across spaces, as published ones may: the last of a question may reach further."""
    texts = [f"The size of k{number} is {word}." for number in range(60) for word in ("vast", "tiny")]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, special_tokens=["<|endoftext|>"]))
    trained.save(str(tmp_path / "tokenizer.json"))
    rows = [f"k{number},{'vast' if number % 2 else 'tiny'}" for number in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["name,size", *rows]) + "\n")
    (tmp_path / "p.toml").write_text(
        'size = ["The size of {key} is {value}.", "of {key} is {value}.", "{key} is {value}."]'
    )
    prepare(
        PrepareConfig(
            facts=tmp_path / "t.csv",
            key="name",
            phrasings=tmp_path / "p.toml",
            tokenizer=str(tmp_path / "tokenizer.json"),
            output=tmp_path / "data",
            validation_fraction=0.3,
        )
    )
    dataset = TokenDataset.open(tmp_path / "data")
    num_cut = 0
    for split in dataset.held_out_splits:
        assert split.facts is not None
        keys = list(split.facts.fact_set.entities)
        for number, (entity, _, phrasing, start) in enumerate(split.facts.rows.tolist()):
            key = keys[entity]
            question = split.facts.fact_set.phrasings["size"][phrasing].partition(" {value}")[0].replace("{key}", key)
            value = split.facts.fact_set.entities[key]["size"]
            # This tokenizer decodes with a space between tokens: what counts are the characters.
            tokens = [dataset.tokenizer.decode([id_]) for id_ in split.document(number)[:-1].tolist()]
            assert question.startswith("".join(tokens[:start]))
            assert value in "".join(tokens[start:])
            num_cut += "".join(tokens[:start]) != question
    assert num_cut
