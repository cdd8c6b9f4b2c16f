from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinyexperts.data.facts.table import airports, read_fact_table
from tinyexperts.errors import InputError


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_a_table_gives_each_entity_its_values_but_empty_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "name,river,people", "Köln, Rhein ,1 080  000", "Ulm,Donau,", '"Bad, Ems",,9700')
    table = read_fact_table(path, key="name")
    assert table.attributes == ("river", "people")
    assert table.entities == {
        "Köln": {"river": "Rhein", "people": "1 080 000"},
        "Ulm": {"river": "Donau"},
        "Bad, Ems": {"people": "9700"},
    }
    assert (table.num_facts, table.num_duplicate_rows, table.num_rows_without_key) == (4, 0, 0)


def test_chosen_attributes_leave_the_other_columns_out(tmp_path: Path) -> None:
    table = read_fact_table(write(tmp_path / "t.tsv", "a\tb\tc", "1\t2\t3"), key="b", attributes=("c",))
    assert table.entities == {"2": {"c": "3"}}


def test_rows_that_repeat_and_rows_without_a_key_are_counted(tmp_path: Path) -> None:
    table = read_fact_table(write(tmp_path / "t.csv", "a;b", "1;x", "1; x", ";y", "2;z"), key="a")
    assert table.entities == {"1": {"b": "x"}, "2": {"b": "z"}}
    assert (table.num_duplicate_rows, table.num_rows_without_key) == (1, 1)


def test_all_keys_that_contradict_themselves_are_named_up_to_five(tmp_path: Path) -> None:
    rows = [f"k{number},{value}" for number in range(7) for value in "xy"]
    sentence = "rows of the same key differ: 'k0', 'k1', 'k2', 'k3', 'k4' and 2 more"
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_fact_table(write(tmp_path / "t.csv", "a,b", *rows), key="a")


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        (["a,b", "1,2"], {"key": "c"}, "has no column 'c'; its columns are 'a', 'b'"),
        (["a,b", "1,2"], {"key": "a", "attributes": ("d",)}, "has no column 'd'; its columns are 'a', 'b'"),
        (["a,b", "1,2"], {"key": "a", "attributes": ("a",)}, "the key 'a' can't be an attribute too"),
        (["a,b,c", "1,2,", "3,4, "], {"key": "a"}, "the column 'c' has no values"),
        (["a,b", ",2"], {"key": "a"}, "has no facts: no row has a key and a value"),
        (["a,b"], {"key": "a"}, "has no facts"),
        (["a,a", "1,2"], {"key": "a"}, "has two columns with the name 'a'"),
        (["a,b", "1,2,3"], {"key": "a"}, "row 0: 3 columns, and the header has 2"),
        ([""], {"key": "a"}, "has no header"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(tmp_path, rows, options, sentence) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_fact_table(write(tmp_path / "t.csv", *rows), **options)


def test_a_file_that_is_no_table_in_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        read_fact_table(path, key="a")
    path.write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(InputError, match="is not UTF-8 text: the byte at offset 6"):
        read_fact_table(path, key="a")


def test_a_smaller_sample_is_a_part_of_a_larger_one(tmp_path: Path) -> None:
    table = read_fact_table(write(tmp_path / "t.csv", "a,b", *(f"{n},{n}" for n in range(50))), key="a")
    few, many = table.sample(7, seed=3), table.sample(20, seed=3)
    assert len(few.entities) == 7
    assert len(many.entities) == 20
    assert few.entities.items() <= many.entities.items()
    assert few.entities != table.sample(7, seed=4).entities
    with pytest.raises(InputError, match="max_entities must be at most 50, the entities that there are, got 51"):
        table.sample(51, seed=0)


def test_airports_are_those_with_an_iata_code() -> None:
    table = airports()
    assert len(table.entities) == 7884
    assert table.entities["NRT"] == {
        "city": "Tokyo",
        "ICAO code": "RJAA",
        "name": "Narita International Airport",
        "elevation": "43 m",
        "time zone": "Asia/Tokyo",
    }
    assert table.num_facts == 5 * 7884 - 816
    assert table.num_duplicate_rows == 0


def test_attributes_of_airports_are_chosen() -> None:
    table = airports(("name", "city"))
    assert table.attributes == ("name", "city")
    assert table.entities["NRT"] == {"name": "Narita International Airport", "city": "Tokyo"}
    assert table.description["attributes"] == "name, city"
    sentence = "the attributes of airports are city, ICAO code, name, elevation, time zone, got 'runway'"
    with pytest.raises(InputError, match=sentence):
        airports(("city", "runway"))
