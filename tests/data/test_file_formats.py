"""Names of files and what is read by them: the same documents however they are written, or one sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyexperts.data.file_formats import read_file
from tinyexperts.data.files import FileCorpus
from tinyexperts.errors import InputError

TEXTS = ["first", "e\u0301 and \u00e9", "CR\r\nLF", "", '"quoted", ; and\ttab']
JSON_LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS))
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".XZ": lzma.compress,
}


def read(path: Path, content: bytes | str, text_field: str = "text") -> list[tuple[str, str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(document.name, document.text) for document in read_file(path, "name", text_field=text_field)]


def texts(path: Path, content: bytes | str, text_field: str = "text") -> list[str]:
    return [text for _, text in read(path, content, text_field)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".json", ".NDJSON", ".Json"])
def test_json_lines_go_by_many_names(tmp_path: Path, suffix: str, packing: str) -> None:
    path = tmp_path / f"a{suffix}{packing}"
    expected = [(f"name:{number}", text) for number, text in enumerate(TEXTS, start=1)]
    for mark in (b"", b"\xef\xbb\xbf"):
        assert read(path, PACKINGS[packing](mark + JSON_LINES.encode())) == expected


@pytest.mark.parametrize("packing", PACKINGS)
def test_text_is_unpacked(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    assert texts(path, PACKINGS[packing](b"\xef\xbb\xbfe\xcc\x81 \xc3\xa9\r\n")) == ["e\u0301 \u00e9\r\n"]
    assert texts(path, PACKINGS[packing](b"")) == [""]


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_damaged_packing_is_one_sentence(tmp_path: Path, name: str, packing: str) -> None:
    path = tmp_path / (name + packing)
    whole = PACKINGS[packing]((JSON_LINES * 1000).encode())
    for content in (whole[:-10], b"not packed at all"):
        with pytest.raises(InputError, match=rf"^.*{name}{packing} is not a whole (gzip|bz2|lzma) file: [^\n]+$"):
            texts(path, content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", [("name", "")]),
        ("{}", [("name", "{}")]),
        ("{}\n{}", [("name", "{}\n{}")]),
        ('{"a": 1}\n', [("name", '{"a": 1}\n')]),
        ('{\n  "text": "x"\n}\n', [("name", '{\n  "text": "x"\n}\n')]),
        ("[1, 2,\n3]", [("name", "[1, 2,\n3]")]),
        ('[{"a": 1}]', [("name", '[{"a": 1}]')]),
        ("[]", [("name", "[]")]),
        ('{"a": "cut', [("name", '{"a": "cut')]),
        ("[" * 100_000, [("name", "[" * 100_000)]),
        ('{"a":' * 100_000, [("name", '{"a":' * 100_000)]),
        ("// settings\n{}", [("name", "// settings\n{}")]),
        ('{"text": "one line"}', [("name:1", "one line")]),
        ('\n\n{"text": null, "a": 1}\n \n', [("name:3", "")]),
        ('{"text": "a"}\n\n{"text": "b"}', [("name:1", "a"), ("name:3", "b")]),
        ('[{"text": "a"},\n {"text": null, "b": 2}]\n', [("name:0", "a"), ("name:1", "")]),
        ('\ufeff  [{"text": "a"}]', [("name:0", "a")]),
    ],
)
def test_json_is_looked_into(tmp_path: Path, content: str, expected: list[tuple[str, str]]) -> None:
    assert read(tmp_path / "a.json", content) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": 2}', r"a\.json, line 1: no field 'text'; the fields are 'a'"),
        ('{"text": "a"}\n{"b": 2}', r"a\.json, line 2: no field 'text'; the fields are 'b'"),
        ('{}\n{"text": "a"}', r"a\.json, line 1: no field 'text'"),
        ('{"text": "a"}\n{"text": ', r"a\.json, line 2: not a JSON object"),
        ('{"text": 5}', r"a\.json, line 1: the field 'text' must be a string, got a int"),
        ('[{"text": "a"}, {"b": 1}]', r"a\.json, element 1: no field 'text'; the fields are 'b'"),
        ('[{"text": "a"}, "b"]', r"a\.json, element 1: not a JSON object but a str"),
        ('[{"text": "\\ud800"}]', r"a\.json, element 0: the field 'text' is not valid Unicode"),
        ("\0", r"a\.json is binary, not text: a zero byte at offset 0"),
        ('{"text": "cut', r"a\.json has the field 'text' and is not JSON: "),
        ('{"text": "a}\n{"text": "b"}', r"a\.json has the field 'text' and is not JSON: "),
        ('[{"text": "a"}, {"text": ', r"a\.json has the field 'text' and is not JSON: "),
        ('{\n"text": "a", // not JSON\n}', r"a\.json has the field 'text' and is not JSON: "),
        (b"[\xff]", r"a\.json is not UTF-8 text: the byte at offset 1"),
    ],
)
def test_broken_json_is_named_by_line_or_element(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.json", content)


def test_a_json_of_lines_is_read_lazily_and_by_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"body": "first"}\n{"body": "second"}\nbroken\n')
    documents = read_file(path, "name", text_field="body")
    assert [next(documents).text, next(documents).text] == ["first", "second"]
    with pytest.raises(InputError, match="line 3"):
        next(documents)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t"), (".CSV", ",")])
def test_rows_of_a_table_are_documents(tmp_path: Path, suffix: str, delimiter: str, packing: str) -> None:
    path = tmp_path / "table"
    long = [*TEXTS, "x" * 200_000]  # beyond the csv module's own limit
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", " text "], *enumerate(long)])
    limit = csv.field_size_limit()
    content = PACKINGS[packing](path.read_bytes())
    assert read(tmp_path / f"a{suffix}{packing}", content) == [(f"name:{i}", text) for i, text in enumerate(long)]
    assert csv.field_size_limit() == limit


def test_a_table_without_the_column_is_one_text(tmp_path: Path) -> None:
    for content in ("x,y\n1,2\n", "", "text1,text2\na,b\n", 'a "quoted" word, and "an open one\n'):
        assert read(tmp_path / "a.csv", content) == [("name", content)]
    assert read(tmp_path / "a.tsv", "text\n") == []
    assert texts(tmp_path / "a.tsv", "id\tbody\n1\tx, y\n", "body") == ["x, y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a\n2,b,c\n", r"a\.csv, row 1: 3 columns, and the header has 2"),
        ("id,text\n1\n", r"a\.csv, row 0: 1 columns, and the header has 2"),
        ('id,text\n1,a\n2,"never closed\n', r"a\.csv, row 1: not a row of a table: "),
        (b"id,text\n1,caf\xe9\n", r"a\.csv is not UTF-8 text: the byte at offset 13"),
    ],
)
def test_broken_table_is_named_by_its_row(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.csv", content)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.zip", r"is an archive \(\.zip\), which isn't read: unpack it and give its files"),
        ("a.tar.gz", r"is an archive \(\.tar\), which isn't read"),
        ("a.TGZ", r"is an archive \(\.tgz\), which isn't read"),
        ("a.7z", r"is an archive \(\.7z\), which isn't read"),
        ("a.jsonl.zst", r"compressed in a way that isn't read \(\.zst\): unpack it, or pack it as \.gz, \.bz2 or \.xz"),
        ("a.txt.lz4", r"compressed in a way that isn't read \(\.lz4\)"),
        ("a.txt.gz.xz", r"is packed twice"),
        ("a.parquet.gz", r"is packed twice"),
    ],
)
def test_what_is_packed_otherwise_is_refused_by_name_and_reported_in_a_folder(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / name).write_text('{"text": "not read"}')
    (tmp_path / "z.txt").write_text("read")
    with pytest.raises(InputError, match=reason):
        list(FileCorpus([tmp_path / name]).documents([]))
    skipped: list[str] = []
    assert [document.text for document in FileCorpus([tmp_path]).documents(skipped)] == ["read"]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{tmp_path / name} is ")


def test_a_packing_that_this_python_lacks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lzma", None)
    with pytest.raises(InputError, match=r"a\.txt\.xz can't be read by this Python, which was built without lzma"):
        read(tmp_path / "a.txt.xz", b"")
