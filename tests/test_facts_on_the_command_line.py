"""Facts as a newcomer meets them: a table becomes a data set, a run, an evaluation and answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tinyexperts.training import ask_run

SIZES = [
    *("--model.vocab-size", 320, "--model.context-length", 48, "--model.d-model", 16, "--model.num-layers", 2),
    *("--model.num-heads", 2, "--num-steps", 3, "--training-flops", None, "--batch-size", 2),
    *("--validation-every", 2, "--validation-tokens", 96, "--no-progress"),
    *("--model.expert-layer.num-experts", 64, "--model.expert-layer.experts-per-head", 3),
]


def write_table(folder: Path) -> Path:
    rows = [f"k{number},{'yes' if number % 4 else 'no'},{number % 3}" for number in range(40)]
    (folder / "t.csv").write_text("\n".join(["name,open,floor", *rows]) + "\n")
    return folder / "t.csv"


@pytest.fixture
def run(run_cli, tmp_path, monkeypatch) -> Path:
    """A run of three steps on the facts of a table, by its commands."""
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("data", "prepare", "--facts", write_table(tmp_path), "--key", "name", "--vocab-size", 320)
    assert code == 0, err
    assert "40 entities with facts: 40 of open, 40 of floor; 0 empty cells" in out
    code, _, err = run_cli("train", "peer", "--data", "data/t", "--run", "runs/t", *SIZES)
    assert code == 0, err
    return Path("runs/t")


def test_a_run_on_facts_is_measured_and_answers(run, run_cli) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in validations] == [2, 3]
    assert all(0 <= line["recall"] <= 1 and line["nats_per_fact"] > 0 for line in validations)

    code, out, err = run_cli("evaluate", run)
    assert code == 0, err
    found = json.loads((run / "evaluation.json").read_text())["facts"]
    for split in ("validation", "unseen-phrasing", "unseen-entities"):
        recall = found[split]["all"]
        assert f"{split}: {recall['recall']:.1%} of {recall['num_facts']} facts recalled (open " in " ".join(
            out.split()
        )
    code, out, _ = run_cli("evaluate", run, "--split", "unseen-entities")
    assert code == 0
    assert "unseen-entities: " in out
    assert "validation: " not in out

    code, out, err = run_cli("ask", run, "The floor of k7 is", "--max-new-tokens", 3, "--num-fired", 2)
    assert code == 0, err
    answer = ask_run(run, "The floor of k7 is", max_new_tokens=3, num_fired=2)
    assert out.startswith("The floor of k7 is ")
    assert f"probability {answer.probability:.1%}" in out
    assert all(f"{expert.id:,}" in out for expert in answer.experts)
    assert len(answer.experts) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([""], "the question must have text, got ''"),
        (["k7 " * 60], r"the question must have at most 46 tokens.* got \d+"),
        (["k7", "--max-new-tokens", 0], "max_new_tokens must be at least 1, got 0"),
        (["k7", "--num-fired", -1], "num_fired must be at least 0, got -1"),
    ],
)
def test_a_question_that_can_not_be_asked_is_refused(run, run_cli, arguments, sentence) -> None:
    code, out, err = run_cli("ask", run, *arguments)
    assert (code, out) == (2, "")
    assert re.search(sentence, err)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("table", "options", "sentence"),
    [
        ("a,b\n1,2\n", ["--key", "name"], "has no column 'name'; its columns are 'a', 'b'"),
        ("a,b\n1,2\n1,3\n", ["--key", "a"], "rows of the same key differ: '1'"),
        ("a,b,c\n1,2,\n", ["--key", "a"], "the column 'c' has no values"),
        ("a,b\n1,2\n", ["--key", "a", "--phrasings", "p.toml"], "a phrasing must have {key} and then {value}"),
        ("a,b\n1,2\n", [], "key must be the column of t.csv that names the entities, got none"),
    ],
)
def test_a_table_that_can_not_be_stated_leaves_nothing(
    run_cli, tmp_path, monkeypatch, table, options, sentence
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(table)
    Path("p.toml").write_text('b = ["{key} is", "{key} is {value}", "{key} has {value}"]')
    code, out, err = run_cli("data", "prepare", "--facts", "t.csv", *options)
    assert (code, out) == (2, "")
    assert sentence in " ".join(err.split())
    assert "Traceback" not in err
    assert not Path("data").exists()
