from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tinyexperts.data.document import Document
from tinyexperts.data.files import FileCorpus
from tinyexperts.errors import InputError


def read(*paths: Path, text_field: str = "text") -> tuple[list[Document], list[str]]:
    skipped: list[str] = []
    return list(FileCorpus(paths, text_field=text_field).documents(skipped)), skipped


def texts(*paths: Path, text_field: str = "text") -> list[str]:
    return [document.text for document in read(*paths, text_field=text_field)[0]]


def test_folder_yields_text_in_sorted_order_without_hidden_entries_and_caches(tmp_path: Path) -> None:
    files = {"b.md": "# b", "a.txt": "a\r\n", "sub/c.rst": "c", "sub/code.py": "x = 1", "z.json": "{}\n{}"}
    hidden = {".git/config": "no", "__pycache__/m.txt": "no", ".env": "no", "sub/.hidden/h.txt": "no"}
    for name, text in (files | hidden).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    documents, skipped = read(tmp_path)
    assert [(document.name, document.text) for document in documents] == [
        ("a.txt", "a\r\n"),
        ("b.md", "# b"),
        ("z.json", "{}\n{}"),
        ("sub/c.rst", "c"),
        ("sub/code.py", "x = 1"),
    ]
    assert skipped == []


def test_binary_files_of_a_folder_are_reported_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "picture.png").write_bytes(b"PNG\0\1")
    (tmp_path / "latin1.txt").write_bytes("größe".encode("latin-1"))
    documents, skipped = read(tmp_path)
    assert [document.text for document in documents] == ["text"]
    assert skipped == [
        f"{tmp_path / 'latin1.txt'} is not UTF-8 text: the byte at offset 2 cannot be decoded",
        f"{tmp_path / 'picture.png'} is binary, not text: a zero byte at offset 3",
    ]


@pytest.mark.parametrize(("content", "offset"), [(b"abc\0d", 3), (b"ab\xff", 2), (b"\xef\xbb\xbfab\xff", 5)])
def test_binary_file_named_itself_is_an_error_with_the_offset(tmp_path: Path, content: bytes, offset: int) -> None:
    path = tmp_path / "given.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"given\.txt is .* offset {offset}\b"):
        texts(path)


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "there"}\n')
    assert texts(tmp_path) == ["hello", "there"]


def test_gzip_of_text_and_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("grüß\n".encode()))
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    assert texts(tmp_path) == ["grüß\n", "one", "two", "three"]


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(1000))[:-20])
    with pytest.raises(InputError, match=r"a\.txt\.gz is not a whole gzip file"):
        texts(path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match=r"a\.txt\.gz is not a whole gzip file"):
        texts(path)


def test_each_json_line_is_a_document_and_a_null_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one\\ntwo", "id": 1}\n\n{"id": 2, "body": null}\n{"body": "三"}')
    documents, _ = read(path, text_field="body")
    assert [document.text for document in documents] == ["one\ntwo", "", "三"]
    assert [document.name for document in documents] == [f"{path}:1", f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 3: not a JSON object: "),
        ('["text"]', r"line 3: not a JSON object but a list"),
        ('{"body": "x", "id": 1}', r"line 3: no field 'text'; the fields are 'body', 'id'"),
        ('{"text": 5}', r"line 3: the field 'text' must be a string, got a int"),
        ('{"text": "\\ud800"}', r"line 3: the field 'text' is not valid Unicode"),
        ("[" * 100_000, r"line 3: not a JSON object: "),
    ],
)
def test_broken_json_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=rf"a\.jsonl, {message}"):
        texts(path)


def test_json_lines_are_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\nbroken\n')
    documents = FileCorpus([path]).documents([])
    assert next(documents).text == "first"
    with pytest.raises(InputError, match="line 2"):
        next(documents)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = [f"text {row}" for row in range(3000)] + [None]
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(3001)), "body": column}), path)
    documents, _ = read(path, text_field="body")
    assert [document.text for document in documents] == [*column[:-1], ""]
    assert documents[2999].name == f"{path}:2999"
    with pytest.raises(InputError, match=r"a\.parquet: no column 'text'; the columns are 'id', 'body'"):
        texts(path)
    with pytest.raises(InputError, match=r"a\.parquet, row 0: the field 'id' must be a string, got a int"):
        texts(path, text_field="id")
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"a\.parquet is not a readable parquet file"):
        texts(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tinyexperts\[data\]'"):
        texts(path)


def test_missing_paths_are_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder: .*nowhere\.txt"):
        FileCorpus([tmp_path, tmp_path / "nowhere.txt"])
    with pytest.raises(InputError, match="name at least one file"):
        FileCorpus([])


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    # By the mode of the file it could not be tested as root, who may read everything.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"cannot read .*a\.txt: Permission denied"):
        texts(path)


def test_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("x")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot list the folder .*closed: Permission denied"):
        texts(tmp_path)


def test_links_to_nowhere_and_pipes_do_not_stop_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert texts(tmp_path) == ["x"]


def test_corpus_can_be_read_again_and_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "x"}))
    corpus = FileCorpus([path], text_field="body")
    assert list(corpus.documents([])) == list(corpus.documents([])) == [Document(f"{path}:1", "x")]
    assert corpus.description() == {"kind": "files", "paths": str(path), "text_field": "body"}
