"""Packages: the documents that they should yield."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

from tinyexperts.data.corpora import CORPORA
from tinyexperts.data.packages import PackageCorpus, PackageFile, Reader, factbook_country, whole_file, wikipedia_leads


def file_of(path: Path, members: str, read: Reader = whole_file) -> PackageFile:
    return PackageFile(
        url=path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), members=members, read=read
    )


def tar_of(path: Path, name: str, content: bytes) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return path


def test_documents_of_wikipedia_and_of_the_factbook(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("data/x.json", json.dumps({"A": {"extract": "An article."}, "B": {"extract": "Another."}}))
    file = file_of(wheel, r"data/.*", wikipedia_leads)
    assert [(d.name, d.text) for d in file.documents(wheel)] == [
        ("A", "A\n\nAn article.\n"),
        ("B", "B\n\nAnother.\n"),
    ]
    country = {"Geography": {"Area": {"total": {"text": "10 sq km"}, "note": "small"}}}
    tar = tar_of(tmp_path / "b.tgz", "package/europe/xx.json", json.dumps(country).encode())
    factbook = CORPORA["factbook"].corpus
    assert isinstance(factbook, PackageCorpus)
    (document,) = file_of(tar, factbook.files[0].members, factbook_country).documents(tar)
    assert document.text == "Geography\nArea\ntotal\n10 sq km\nnote: small\n"


def test_a_corpus_of_packages_is_prepared_by_its_name(run_cli, monkeypatch, tmp_path) -> None:
    from tinyexperts.data import corpora

    files = tuple(
        file_of(tar_of(tmp_path / f"{number}.tgz", "a.txt", f"text {number}\n".encode() * 40), "a.txt")
        for number in range(4)
    )
    entry = corpora.NamedCorpus(corpus=PackageCorpus(files), description="", license="", page="")
    monkeypatch.setattr(corpora, "CORPORA", {"sayings": entry})
    output = tmp_path / "data"
    code, out, err = run_cli("data", "prepare", "--corpus", "sayings", "--output", output, "--vocab-size", 260)
    assert code == 0, err
    assert "validation         1 documents" in out
    corpus = json.loads((output / "index.json").read_text())["corpus"]
    assert corpus["kind"] == "packages"
    assert corpus["urls"].split() == [file.url for file in files]
    assert corpus["sha256"].split() == [file.sha256 for file in files]
