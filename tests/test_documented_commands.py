"""What README and guides show: commands for training and planning are accepted, by as many ranks; Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from tinyexperts import training
from tinyexperts.model import generate
from tinyexperts.training.distributed.mesh import mesh_shape

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/how-to").glob("*.md"))]


def documented():
    """Page, number of ranks, and words after `tinyexperts`, of each command shown in a block."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        nodes = int((re.search(r"--nodes=(\d+)", text) or "01")[1])
        for line in re.findall(r"^(?:    |srun )((?:torchrun|tinyexperts (?:train|plan)) .*)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            num_ranks = int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else 1
            num_ranks *= nodes if "--nnodes" in words else 1
            yield pytest.param(num_ranks, words[words.index("tinyexperts") + 1 :], id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize(("num_ranks", "words"), list(documented()))
def test_a_documented_command_is_accepted(run_cli, monkeypatch, num_ranks, words):
    given = []
    monkeypatch.setattr(training, "train", lambda config, **_: given.append(config))
    code, out, err = run_cli(*words)
    assert (code, err) == (0, "")
    if words[0] == "plan":
        assert "The quickest that fits" in out
        return
    (config,) = given
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(num_ranks, 8)))
    assert config.batch_size % num_ranks == 0
    assert mesh_shape(config, num_ranks)[1] == (8 if num_ranks >= 8 else 1)  # tables are shared where there is a node


def test_commands_are_found():
    found = list(documented())
    assert {each.values[0] for each in found} == {1, 2, 8, 32}
    assert len(found) >= 6


def python_of(page):
    """The blocks of Python of a page, and the statements about tinyexperts in its lines."""
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return blocks, re.findall(r"`(tinyexperts\.[\w.]+\([^`]*\))`", text)


def run_python(page, tmp_path, monkeypatch, make_config):
    """Run the code of a page, with fewer experts and next to the run that it reads; return its names and values."""
    monkeypatch.chdir(tmp_path)
    blocks, statements = python_of(page)
    if statements:
        training.train(make_config(run="runs/peer", num_steps=1), progress=False)
    names = {}
    for block in blocks:
        exec(block.replace("512**2", "32**2"), names)
    values = []
    for statement in statements:
        module = statement.partition("(")[0].rpartition(".")[0]
        values.append(eval(statement, {"tinyexperts": __import__(module)}))
    return names, values


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, make_config):
    names, values = run_python(page, tmp_path, monkeypatch, make_config)
    if page.name == "README.md":
        assert names["y"].shape == names["x"].shape
        assert names["ids"].shape == (4, 128, 8, 16)
        (model,) = values
        assert generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape == (1, 7)
    if page.name == "your-own-loop.md":
        assert names["layer"].experts.grad.is_sparse


def test_python_is_found():
    blocks, statements = python_of(ROOT / "README.md")
    assert len(blocks) == 1
    assert statements == ['tinyexperts.training.load_model("runs/peer")']
    everything = "".join(page.read_text() for page in PAGES)
    assert everything.count("```python") == sum(len(python_of(page)[0]) for page in PAGES)


@pytest.mark.parametrize("wrong", ["```python\n1 / 0\n```\n", "says `tinyexperts.training.load_models(1)`"])
def test_python_that_does_not_run_is_noticed(wrong, tmp_path, monkeypatch, make_config):
    (tmp_path / "page.md").write_text(wrong)
    with pytest.raises((ZeroDivisionError, AttributeError)):
        run_python(tmp_path / "page.md", tmp_path, monkeypatch, make_config)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_files_that_a_page_names_are_there(page):
    named = set(re.findall(r"`([\w./]+(?:\.py|/))`", (ROOT / page).read_text())) - {"cpu.py", "gpu.py"}
    found = {name for name in named if (ROOT / name).exists() or list((ROOT / "tinyexperts").rglob(name))}
    assert len(named) > 5
    in_an_operator = {"reference.py", "portable.py", "operator.py", "__init__.py"}
    assert named - found <= in_an_operator


def test_each_answer_names_a_file_to_start_from_and_at_most_seven():
    text = (ROOT / "docs/architecture.md").read_text().partition("## Where would I add")[2]
    answers = re.findall(r"^\*\*.*?(?=^\*\*|^The checklists)", text, re.MULTILINE | re.DOTALL)
    assert len(answers) >= 5
    for answer in answers:
        assert "Start from `" in answer
        assert 1 < len(set(re.findall(r"`[\w/]+(?:\.py|\.md|/)`", answer))) <= 7


def test_each_command_of_the_ecosystem_page_selects_tests():
    commands = re.findall(r"`pytest ([^`]*)`", (ROOT / "docs/ecosystem.md").read_text())
    assert len(commands) > 15
    for command in commands:
        words = shlex.split(command)
        paths = [ROOT / word for word in words if word.startswith("tests/")]
        names = ""
        for path in paths:
            files = [path] if path.suffix else sorted(path.rglob("test_*.py"))
            assert all(file.is_file() for file in files), command
            names += " ".join(
                re.findall(r"^def (test_\w+)", "\n".join(file.read_text() for file in files), re.MULTILINE)
            )
        assert names, command
        if "-k" in words:
            assert all(word in names for word in words[words.index("-k") + 1].split(" or ")), command
