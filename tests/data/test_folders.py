"""Folders with links: every folder once, at the same names as without them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tinyexperts.data.files import FileCorpus
from tinyexperts.data.folders import walk_files
from tinyexperts.errors import InputError


def names_in(folder: Path) -> tuple[list[str], list[str]]:
    skipped: list[str] = []
    return [document.name for document in FileCorpus([folder]).documents(skipped)], skipped


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_linked_folder_is_read_at_the_names_by_which_it_is_reached(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts", "a.txt", "z/z.txt")
    write(tmp_path / "elsewhere", "one.txt", "sub/two.txt", ".hidden/no.txt", "__pycache__/no.txt")
    (texts / "m").symlink_to(tmp_path / "elsewhere")
    (texts / "m.txt").symlink_to(tmp_path / "elsewhere/one.txt")
    assert names_in(texts) == (["a.txt", "m.txt", "m/one.txt", "m/sub/two.txt", "z/z.txt"], [])


def test_a_folder_is_read_once_whatever_leads_to_it_and_its_real_place_wins(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts", "b/real.txt", "b/deep/deeper.txt")
    write(tmp_path / "elsewhere", "one.txt", "sub/two.txt")
    for name, target in (
        ("a", texts / "b"),  # sorted before the real place
        ("c", tmp_path / "elsewhere"),
        ("d", tmp_path / "elsewhere"),
        ("e", texts / "b/deep"),
        ("f", tmp_path / "elsewhere/sub"),
    ):
        (texts / name).symlink_to(target)
    assert names_in(texts) == (["b/real.txt", "b/deep/deeper.txt", "c/one.txt", "c/sub/two.txt"], [])
    # Where a part of it was reached first, the rest comes at its own names.
    (texts / "b1").symlink_to(tmp_path / "elsewhere/sub")
    assert names_in(texts)[0] == ["b/real.txt", "b/deep/deeper.txt", "b1/two.txt", "c/one.txt"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts", "a/one.txt", "b/two.txt")
    (texts / "a/up").symlink_to(texts)
    (texts / "a/b").symlink_to(texts / "b")
    (texts / "b/a").symlink_to(texts / "a")
    (texts / "b/self").symlink_to(texts / "b")
    assert names_in(texts) == (["a/one.txt", "b/two.txt"], [])
    other = write(tmp_path / "other", "three.txt")
    (texts / "c").symlink_to(other)
    (other / "back").symlink_to(texts)
    (other / "self").symlink_to(other)
    assert names_in(texts) == (["a/one.txt", "b/two.txt", "c/three.txt"], [])
    assert names_in(other) == (["three.txt", "back/a/one.txt", "back/b/two.txt"], [])


def test_a_link_given_itself_is_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "texts", "a.txt", "sub/b.txt")
    (tmp_path / "link").symlink_to(tmp_path / "texts")
    assert names_in(tmp_path / "link") == (["a.txt", "sub/b.txt"], [])


def test_excluded_names_go_by_the_name_of_the_link(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts", "a.py")
    write(tmp_path / "packages", "p.py")
    (texts / "site-packages").symlink_to(tmp_path / "packages")
    (texts / ".cache").symlink_to(tmp_path / "packages")
    assert list(walk_files(texts, ("site-packages",))) == [texts / "a.py"]
    assert list(walk_files(texts, ())) == [texts / "a.py", texts / "site-packages/p.py"]


def test_what_is_no_file_is_reported_in_a_folder_and_refused_when_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write(tmp_path / "texts", "a.txt")
    (texts / "dangling").symlink_to(tmp_path / "nowhere")
    (texts / "itself").symlink_to(texts / "itself")
    os.mkfifo(texts / "pipe")
    monkeypatch.chdir(texts)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    sentences = [
        f"{texts / 'dangling'} is a link that leads nowhere",
        f"{texts / 'itself'} is a link that leads nowhere",
        f"{texts / 'pipe'} is a pipe, which isn't read: give a file that holds the text",
        f"{texts / 'socket'} is a socket, which isn't read: give a file that holds the text",
    ]
    assert names_in(texts) == (["a.txt"], sentences)
    for sentence in sentences:
        with pytest.raises(InputError) as error:
            names_in(Path(sentence.split(" is ")[0]))
        assert str(error.value) == sentence
