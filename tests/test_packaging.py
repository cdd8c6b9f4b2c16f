"""What is installed: three packages and extras; what is missing is named with the command that installs it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import tinyexperts
from tinyexperts.extras import EXTRAS, MissingExtra, require_extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE_ROOMS = ("ops", "layers", "optim", "model")
TRAIN_ROOMS = (*CORE_ROOMS, "data", "evaluation", "training", "planning", "cli")
STUDY_ROOMS = (*TRAIN_ROOMS, "report", "study", "bench")
HF_ROOMS = (*TRAIN_ROOMS, "hub")


def names(requirements: list[str]) -> set[str]:
    """The packages of some requirements; an extra of ours is replaced by its packages."""
    found = set()
    for requirement in requirements:
        ours = re.fullmatch(r"tinyexperts\[(.*)\]", requirement)
        if ours:
            for extra in ours[1].split(","):
                found |= names(PROJECT["optional-dependencies"][extra])
        else:
            found.add(re.match(r"[\w-]+", requirement)[0])
    return found


PACKAGES = {extra: names(listed) for extra, listed in PROJECT["optional-dependencies"].items()}


def python_with(extra: str | None, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python where nothing can be imported of the extras but the packages of one of them."""
    refused = PACKAGES["all"] - PACKAGES.get(extra, set())
    prelude = f"""
import sys
from importlib.machinery import PathFinder
class WithoutRefused(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {refused!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutRefused
"""
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False, cwd=ROOT)


def imports_of(rooms: tuple[str, ...]) -> str:
    """Code that imports every module of some rooms; those of Triton's kernels where there is Triton."""
    return f"""
import importlib, pkgutil
for room in {rooms!r}:
    package = importlib.import_module("tinyexperts." + room)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
print("imported")
"""


def test_three_packages_are_needed_and_the_extras_bring_the_rest():
    assert names(PROJECT["dependencies"]) == {"torch", "numpy", "numba"}
    assert set(PACKAGES) == {"train", "study", "data", "slurm", "hf", "serve", "eval", "gpu", "all", "dev"}
    assert PACKAGES["gpu"] == {"triton"}  # no part of all: there is none but on Linux
    assert PACKAGES["train"] == {
        *("tokenizers", "safetensors", "pydantic", "filelock", "tyro", "rich", "tensorboard"),
    }
    assert PACKAGES["study"] == PACKAGES["train"] | {"matplotlib", "jinja2", "scipy", "pandas", "airportsdata"}
    assert PACKAGES["data"] == PACKAGES["train"] | {"datasets", "pyarrow", "tiktoken"}
    assert PACKAGES["slurm"] == PACKAGES["study"] | {"submitit"}
    assert PACKAGES["hf"] == PACKAGES["train"] | {"transformers", "accelerate"}
    assert PACKAGES["serve"] == PACKAGES["hf"] | {"fastapi", "uvicorn", "openai"}
    assert PACKAGES["eval"] == PACKAGES["hf"] | {"lm_eval"}
    assert PACKAGES["all"] == set().union(*(PACKAGES[extra] for extra in ("study", "data", "slurm", "serve", "eval")))
    assert PACKAGES["dev"] >= PACKAGES["all"] | PACKAGES["gpu"] | {"build", "twine", "peft"}
    assert {extra: set(packages) for extra, packages in EXTRAS.items()} == {
        extra: PACKAGES[extra] for extra in ("train", "study", "hf", "serve", "eval")
    }


def test_what_is_installed_for_the_tests_is_pinned():
    pinned = names((ROOT / "constraints.txt").read_text().splitlines()[1:])
    assert pinned >= PACKAGES["dev"] | names(PROJECT["dependencies"])


def test_the_version_is_written_in_one_place():
    assert "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", tinyexperts.__version__)


@pytest.mark.parametrize(
    ("extra", "rooms"),
    [
        ("train", TRAIN_ROOMS),
        pytest.param("study", STUDY_ROOMS, marks=pytest.mark.slow),
        pytest.param("hf", HF_ROOMS, marks=pytest.mark.slow),
    ],
)
def test_an_extra_brings_what_its_rooms_import(extra, rooms):
    done = python_with(extra, imports_of(rooms))
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr


def test_the_layers_train_with_the_three_packages_alone():
    done = python_with(
        None,
        imports_of(CORE_ROOMS)
        + """
import torch
from tinyexperts import PEER
from tinyexperts.optim import RowSparseAdam
layer = PEER(16, 64, num_heads=2, experts_per_head=3, query_norm="batch", sparse=True)
optimizer = RowSparseAdam([layer.experts], lr=1e-3)
before = layer.experts.detach().clone()
layer(torch.randn(5, 16)).square().sum().backward()
optimizer.step()
print((layer.experts != before).any().item())
""",
    )
    assert (done.returncode, done.stdout) == (0, "imported\nTrue\n"), done.stderr


@pytest.mark.parametrize(
    ("installed", "room", "wanted"),
    [
        (None, "training", "train"),
        (None, "data", "train"),
        (None, "planning", "train"),
        ("train", "study", "study"),
        ("train", "report", "study"),
        ("train", "bench", "study"),
        ("train", "hub", "hf"),
    ],
)
def test_a_room_without_its_extra_names_the_command_that_installs_it(installed, room, wanted):
    done = python_with(
        installed,
        f"""
try:
    import tinyexperts.{room}
except ImportError as error:
    print(error)
""",
    )
    assert re.fullmatch(
        rf"tinyexperts\.\w+ needs the extra {wanted}, of which .* can't be found: "
        rf"pip install 'tinyexperts\[{wanted}\]'\n",
        done.stdout,
    ), done


@pytest.mark.parametrize(
    ("installed", "words", "sentence"),
    [
        (None, ["--help"], "the command tinyexperts needs the extra train, of which "),
        (None, ["train", "peer"], "the command tinyexperts needs the extra train, of which "),
        ("train", ["study", "status", "x"], "tinyexperts.study needs the extra study, of which matplotlib, "),
        (
            "train",
            ["export", "x", "y", "--license", "mit"],
            "tinyexperts.hub needs the extra hf, of which transformers",
        ),
        pytest.param(
            *("hf", ["serve", "x"], "tinyexperts.hub.serving needs the extra serve, of which fastapi, "),
            marks=pytest.mark.slow,  # imports transformers
        ),
        pytest.param(
            *("hf", ["evaluate", "x", "--tasks", "y"], "tinyexperts.hub.tasks needs the extra eval, of which lm_"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_verb_without_its_extra_is_one_sentence(installed, words, sentence):
    done = python_with(installed, f"sys.argv = ['tinyexperts', *{words}]\nfrom tinyexperts.cli import main\nmain()\n")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"tinyexperts: {sentence}")


def test_an_older_transformers_is_refused_in_a_sentence():
    done = python_with(
        "hf",
        """
import importlib.metadata
found = importlib.metadata.version
importlib.metadata.version = lambda name: "5.23.1" if name == "transformers" else found(name)
sys.argv = ["tinyexperts", "import", "x"]
from tinyexperts.cli import main
main()
""",
    )
    sentence = "tinyexperts.hub needs transformers 5.24 or later, got 5.23.1: pip install --upgrade 'tinyexperts[hf]'"
    assert (done.returncode, done.stderr) == (2, f"tinyexperts: {sentence}\n")


def test_what_is_missing_is_named(monkeypatch):
    require_extra("train", "a room")
    monkeypatch.setitem(EXTRAS, "train", ("torch", "no_such_package", "nor_this"))
    with pytest.raises(MissingExtra, match="a room needs the extra train, of which no_such_package, nor_this can't"):
        require_extra("train", "a room")


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    source, dist, environment = tmp_path / "source", tmp_path / "dist", tmp_path / "environment"
    left_out = shutil.ignore_patterns(".*", "runs", "site", "dist", "build", "__pycache__", "*.egg-info", "*.nb[ci]")
    shutil.copytree(ROOT, source, ignore=left_out)

    def run(*command: object, code: int = 0) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(sys.executable, "-m", "build", "--outdir", dist, source)
    (wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive)
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert held >= {"tests/test_packaging.py", "docs/notation.md", "Makefile", "constraints.txt"}
    assert not any(name.startswith("runs") or "__pycache__" in name for name in held)
    with zipfile.ZipFile(wheel) as opened:
        packed = set(opened.namelist())
    sources = {path.relative_to(source).as_posix() for path in (source / "tinyexperts").rglob("*") if path.is_file()}
    assert {name for name in packed if name.startswith("tinyexperts/")} == sources

    venv.create(environment, with_pip=True)
    python, install = environment / "bin/python", ["-m", "pip", "install", "--no-compile", "-c"]
    run(python, *install, ROOT / "constraints.txt", wheel)
    forward = "import torch, tinyexperts; print(tinyexperts.PEER(16, 256)(torch.ones(3, 16)).shape)"
    assert run(python, "-c", forward) == "torch.Size([3, 16])\n"
    assert "pip install 'tinyexperts[train]'" in run(environment / "bin/tinyexperts", "--help", code=2)
    run(python, *install, ROOT / "constraints.txt", f"{wheel}[study]")
    assert run(environment / "bin/tinyexperts", "--version") == f"tinyexperts {tinyexperts.__version__}\n"
    assert run(python, "-c", imports_of(STUDY_ROOMS)) == "imported\n"
