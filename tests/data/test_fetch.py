"""Corpora are fetched: whole and unchanged, and nothing of a file that is not what was published."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest

from tinyexperts.data import FileCorpus, corpora
from tinyexperts.data.corpora import NamedCorpus
from tinyexperts.data.document import Corpus
from tinyexperts.data.hub import HubCorpus
from tinyexperts.data.packages import PackageCorpus, PackageFile, wikipedia_leads

MEMBERS = {
    "package/data/b.txt": "second",
    "package/data/a.txt": "\ufefffirst, \u00e9",
    "package/data/a.json": "{}",
    "package/a.txt": "not in the folder",
}


def tar_of(path: Path, members: dict[str, str]) -> PackageFile:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            content = text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return package_of(path)


def package_of(path: Path, **changes: object) -> PackageFile:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    settings: dict[str, object] = {"url": path.as_uri(), "sha256": sha256, "members": r"package/data/.*\.txt"}
    return PackageFile(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture
def run(run_cli, monkeypatch, tmp_path):
    """Run `data fetch` with a corpus of the test's own; return (exit code, standard output, error)."""
    monkeypatch.chdir(tmp_path)

    def run_with(corpus: Corpus | None, *arguments: object):
        if corpus is not None:
            entry = NamedCorpus(corpus=corpus, description="sayings", license="CC0", page="https://example.org")
            monkeypatch.setattr(corpora, "CORPORA", {"sayings": entry})
        return run_cli("data", "fetch", *arguments)

    return run_with


def corpus_of(*files: PackageFile) -> PackageCorpus:
    return PackageCorpus(files)


def refusal(outcome: tuple[int, str, str], folder: Path) -> str:
    code, out, err = outcome
    assert (code, out) == (2, "")
    (sentence,) = [line for line in err.splitlines() if line.startswith("tinyexperts: ")]
    assert "Traceback" not in err
    assert not folder.exists() or list(folder.iterdir()) == []
    return sentence


def test_a_text_comes_whole_with_its_license_and_can_be_prepared(run, tmp_path):
    more = {"package/data/c.txt": "third"}
    corpus = corpus_of(tar_of(tmp_path / "one.tgz", MEMBERS), tar_of(tmp_path / "two.tar.gz", more))
    code, out, err = run(corpus, "sayings")
    assert code == 0, err
    path = tmp_path / "texts/sayings.jsonl"
    assert out.startswith("texts/sayings.jsonl: 3 documents, 20 bytes of text\n  license  CC0\n  sha256   ")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in out
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    assert documents == [
        {"name": "package/data/a.txt", "text": "first, \u00e9"},
        {"name": "package/data/b.txt", "text": "second"},
        {"name": "package/data/c.txt", "text": "third"},
    ]
    assert [d.text for d in FileCorpus([path]).documents([])] == ["first, \u00e9", "second", "third"]
    record = json.loads((tmp_path / "texts/.sayings.source.json").read_text())
    assert record["license"] == "CC0"
    assert record["sha256"] == digest
    assert [package["sha256"] for package in record["packages"]] == [p.sha256 for p in corpus.files]
    assert sorted(entry.name for entry in (tmp_path / "texts").iterdir()) == [".sayings.source.json", "sayings.jsonl"]
    assert len(list(FileCorpus([tmp_path / "texts"]).documents([]))) == 3, "the record is no text"

    # It is not brought again, and a change is noticed.
    (tmp_path / "one.tgz").unlink()
    code, out, err = run(corpus, "sayings")
    assert (code, err.count("MB")) == (0, 0)
    assert "there already, checksum right" in out
    path.write_text(path.read_text() + "{}\n")
    code, out, err = run(corpus, "sayings")
    assert code == 2
    assert f"texts/sayings.jsonl has been changed since it was fetched: its sha256 was {digest}, is" in err
    (tmp_path / "texts/.sayings.source.json").unlink()
    assert "does not say where from" in run(corpus, "sayings")[2]


def test_other_files_than_those_that_were_published_are_refused(run, tmp_path):
    good = tar_of(tmp_path / "one.tgz", MEMBERS)
    texts = tmp_path / "texts"
    other = package_of(tmp_path / "one.tgz", sha256="0" * 64)
    sentence = refusal(run(corpus_of(good, other), "sayings"), texts)
    assert f"its sha256 is {good.sha256}, it must be {other.sha256}" in sentence
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "one.tgz").read_bytes()[:-40])
    assert "does not hold the text" in refusal(run(corpus_of(package_of(tmp_path / "cut.tgz")), "sayings"), texts)
    (tmp_path / "latin.tgz").write_bytes(b"nothing")
    assert "does not hold the text" in refusal(run(corpus_of(package_of(tmp_path / "latin.tgz")), "sayings"), texts)
    nothing = package_of(tmp_path / "one.tgz", members="none")
    assert "without a document" in refusal(run(corpus_of(nothing), "sayings"), texts)
    wrong_kind = package_of(tmp_path / "one.tgz", read=wikipedia_leads)
    assert "does not hold the text" in refusal(run(corpus_of(wrong_kind), "sayings"), texts)


def test_no_network_and_bad_arguments_are_one_sentence(run, tmp_path):
    package = PackageFile(url="http://127.0.0.1:9/a.tgz", sha256="", members="")
    sentence = refusal(run(corpus_of(package), "sayings"), tmp_path / "texts")
    assert sentence.startswith("tinyexperts: cannot fetch http://127.0.0.1:9/a.tgz: ")
    for limit in (0, "inf", "nan"):
        assert "--max-mb must be positive and" in refusal(run(None, "--max-mb", limit), tmp_path / "texts")
    sentence = refusal(run(corpus_of(package), "sayngs"), tmp_path / "texts")
    assert sentence == "tinyexperts: there is no corpus 'sayngs' to fetch; did you mean sayings?"
    assert "the names are sayings" in refusal(run(corpus_of(package), "x"), tmp_path / "texts")


def test_a_data_set_of_the_hub_is_read_up_to_a_limit(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": letter * 400_000}) + "\n" for letter in "abcd"))
    corpus = HubCorpus(path="json", data_files={"train": str(rows)})
    code, out, err = run(corpus, "sayings", "--max-mb", 1)
    assert code == 0, err
    assert "sayings.jsonl: 2 documents, 800,000 bytes" in out
    code, _, err = run(corpus, "sayings", "--max-mb", 2)
    assert code == 2
    assert "was fetched otherwise (max_bytes was 1000000, is 2000000): move it away to fetch it again" in err
    (tmp_path / "texts/sayings.jsonl").unlink()
    code, _, err = run(corpus, "sayings", "--max-mb", 0.3)
    assert (code, "longer than 300,000 bytes: raise --max-mb" in err) == (2, True)


def test_a_text_of_another_release_is_not_taken_for_this_one(run, tmp_path):
    assert run(corpus_of(tar_of(tmp_path / "one.tgz", MEMBERS)), "sayings")[0] == 0
    code, _, err = run(corpus_of(tar_of(tmp_path / "two.tgz", MEMBERS)), "sayings")
    assert (code, "was fetched otherwise (packages was" in err) == (2, True)


class _Answers(http.server.BaseHTTPRequestHandler):
    """Half of what it announces, and an error."""

    def do_GET(self):
        if self.path == "/gone.tgz":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 500)

    def log_message(self, *arguments):
        pass


def test_a_server_that_fails_is_reported(run, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.HTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        for name, reason in (("half.tgz", "ended after 500 of 1,000 bytes"), ("gone.tgz", "Not Found")):
            package = PackageFile(url=f"http://127.0.0.1:{server.server_port}/{name}", sha256="", members="")
            assert reason in refusal(run(corpus_of(package), "sayings"), tmp_path / "texts")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_names_are_listed(run):
    code, out, _ = run(None)
    assert code == 0
    for name in ("python-code", "speeches", "curation-corpus", "ODC-BY"):
        assert name in out
