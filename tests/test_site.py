"""The documentation site is built without a warning, and holds every page and public name."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tinyexperts

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    done = subprocess.run([*command, "--site-dir", folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "report.md"]
    assert len(pages) > 15
    for page in pages:
        inside = page.relative_to(ROOT / "docs").with_suffix("")
        built = inside.parent if inside.name == "README" else inside
        assert (site / built / "index.html").is_file(), page


def test_the_first_page_is_the_readme(site):
    text = (site / "index.html").read_text()
    assert "Two commands" in text
    assert 'href="architecture/"' in text
    assert 'src="demo-recall.svg"' in text


def test_the_reference_has_the_public_names(site):
    pages = [page for page in (ROOT / "docs/reference").glob("*.md") if page.stem != "study"]
    assert len(pages) == 9
    for page in pages:
        package = import_module(f"tinyexperts.{page.stem}")
        text = (site / f"reference/{page.stem}/index.html").read_text()
        shown = re.findall(r'<h2 id="tinyexperts\.[^"]*?(\w+)"', text)
        assert sorted(shown) == sorted(package.__all__)
    assert set(tinyexperts.__all__) - {"__version__"} <= set(import_module("tinyexperts.layers").__all__)


def test_the_reference_describes_arguments(site):
    assert "router_weights" in (site / "reference/layers/index.html").read_text()
    assert "look at x" in (site / "reference/ops/index.html").read_text()
    assert "num_parallel" in (site / "reference/study/index.html").read_text()


def test_a_link_that_leads_nowhere_is_noticed(tmp_path):
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/site.py").write_text((ROOT / "docs/site.py").read_text())
    (tmp_path / "docs/page.md").write_text("[nowhere](missing.md)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "missing.md" in done.stderr
