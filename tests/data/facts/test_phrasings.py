from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinyexperts.data.facts.phrasings import (
    Phrasing,
    airport_phrasings,
    default_phrasings,
    phrasings_of,
    read_phrasings,
)
from tinyexperts.data.facts.table import airports
from tinyexperts.errors import InputError

THREE = ("The {attribute} of {key} is {value}.", "{key} has {attribute} {value}", "Of {key}: {attribute} {value}!")


def test_a_question_is_the_statement_up_to_the_value() -> None:
    phrasing = Phrasing("The city of {key} is {value}.")
    assert phrasing.question("NRT") == "The city of NRT is"
    assert phrasing.statement("NRT", "Tokyo") == "The city of NRT is Tokyo."


def test_braces_of_keys_and_values_are_text() -> None:
    assert Phrasing("{key}: {value}.").statement("{value}", "{key}") == "{value}: {key}."


def test_default_phrasings_speak_of_any_column() -> None:
    texts = [phrasing.text for phrasing in default_phrasings("birth_year")]
    assert texts[0] == "The birth year of {key} is {value}."
    assert len(set(texts)) == len(texts) == 6


def test_phrasings_of_airports_keep_the_rules() -> None:
    questions = []
    for attribute, phrasings in airport_phrasings(airports().attributes).items():
        assert phrasings_of([phrasing.text for phrasing in phrasings], attribute, "here") == phrasings
        questions += [phrasing.question("NRT") for phrasing in phrasings]
    assert len(set(questions)) == len(questions) == 30


def test_a_file_gives_phrasings_by_attribute_and_for_all_others(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        f'"*" = {list(THREE)!r}\nriver = ["{{key}} am {{value}}.", "{{key}} an {{value}}", "In {{key}} {{value}}"]'
    )
    phrasings = read_phrasings(path, ("river", "people"))
    assert [phrasing.text for phrasing in phrasings["river"]] == [
        "{key} am {value}.",
        "{key} an {value}",
        "In {key} {value}",
    ]
    assert phrasings["people"][0].text == "The people of {key} is {value}."
    path.write_text("")
    assert read_phrasings(path, ("people",)) == {"people": default_phrasings("people")}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("river = [", "is not TOML"),
        ("sea = []", "has phrasings for 'sea'; the attributes are 'river', 'people'"),
        ("river = 3", "'river' must be a list of phrasings, got 3"),
        ('river = ["{key} {value}", "a {key} {value}"]', "'river' needs at least 3 phrasings"),
        (
            'river = ["{key} is", "a {key} {value}", "b {key} {value}"]',
            "{key} and then {value}, once each, got '{key} is'",
        ),
        ('river = ["is {value}", "a {key} {value}", "b {key} {value}"]', "once each, got 'is {value}'"),
        ('river = ["{value} of {key}", "a {key} {value}", "b {key} {value}"]', "once each, got '{value} of {key}'"),
        ('river = ["{key}{value}", "a {key} {value}", "b {key} {value}"]', "{value} must follow a space"),
        ('river = ["{key} {value} m", "a {key} {value}", "b {key} {value}"]', "and end the phrasing"),
        (
            'river = ["a {key} {value}", "a {key} {value}", "b {key} {value}"]',
            "has the phrasing 'a {key} {value}' twice",
        ),
        ('"*" = ["a {key} {value}", "c {key} {value}", "b {key} {value}"]', "'a {key}' asks for two attributes"),
    ],
)
def test_phrasings_that_break_a_rule_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_phrasings(path, ("river", "people"))


def test_a_missing_file_of_phrasings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        read_phrasings(tmp_path / "p.toml", ("river",))
