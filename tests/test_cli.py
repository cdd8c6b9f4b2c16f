"""The command line as a newcomer uses it: text to a trained, measured, speaking model; bad input in one sentence."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys

import pytest

from tinyexperts import training

TINY_MODEL = [
    *("--model.vocab-size", 300, "--model.context-length", 16, "--model.d-model", 16, "--model.num-layers", 2),
    *("--model.num-heads", 2, "--model.sparse-layer.num-experts", 64, "--model.sparse-layer.num-heads", 2),
    *("--model.sparse-layer.experts-per-head", 3, "--model.sparse-layer.query-dim", 6),
]


@pytest.fixture
def folder_of_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    words = ["router", "experts", "answer", "queries", "the", "million", "single", "neuron", "retrieves", "of", "a"]
    for number in range(30):
        text = " ".join(random.Random(number).choices(words, k=150))
        (folder / f"{number}.txt").write_text(f"Text {number}: {text}")
    return folder


def test_from_a_folder_of_text_to_a_model_that_speaks(run_cli, folder_of_text, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    code, out, err = run_cli("data", "prepare", "--files", folder_of_text, "--output", data, "--vocab-size", 300)
    assert code == 0, err
    assert "28 documents" in out
    code, out, _ = run_cli("data", "verify", data)
    assert code == 0
    assert "is whole" in out
    training = [
        *("train", "peer", "--run", run, "--data", data, "--training-flops", "None", "--num-steps", 20),
        *("--threads", 1, *TINY_MODEL),
    ]
    code, _, err = run_cli(*training)
    assert code == 0, err
    assert "20 steps on cpu in fp32; table gradients sparse" in " ".join(err.split())
    code, out, err = run_cli(*training)
    assert (code, out) == (2, "")
    assert err == f"tinyexperts: the run folder {run} exists: add --resume to go on with it, or choose another --run\n"
    assert run_cli(*training, "--resume", "--no-progress")[0] == 0

    code, out, _ = run_cli("evaluate", run)
    assert code == 0
    assert "of 64 experts used" in out
    saved = json.loads((run / "evaluation.json").read_text())
    assert f"{saved['loss']:.4f}" in out
    code, out, _ = run_cli("evaluate", run, "--files", folder_of_text, "--max-tokens", 100)
    assert code == 0
    assert "unknown" in out
    assert json.loads((run / "evaluation.json").read_text()) == saved

    code, out, _ = run_cli("generate", run, "--prompt", "the", "--max-new-tokens", 6, "--save")
    assert code == 0
    assert out.startswith("the")
    (sample,) = json.loads((run / "samples.json").read_text())
    assert sample["prompt"] + sample["completion"] + "\n" == out
    (run / "samples.json").write_text("{")
    code, out, err = run_cli("generate", run, "--prompt", "the", "--save")  # as many tokens as the context holds
    assert code == 2
    assert out.startswith("the")
    assert err.startswith(f"tinyexperts: {run}/samples.json is damaged, the sample is not saved")
    assert (run / "samples.json").read_text() == "{"
    assert (
        run_cli("generate", run, "--prompt", "the", "--temperature", "1e-42")[:2]
        == run_cli("generate", run, "--prompt", "the", "--temperature", 0)[:2]
    )
    (folder_of_text / "binary.bin").write_bytes(b"\0\1")
    (folder_of_text / "x.jsonl").write_text('{"body": "the million experts"}\n')
    code, _, err = run_cli("evaluate", run, "--files", folder_of_text)
    assert code == 2
    assert "no field 'text'; the fields are 'body'" in err
    (folder_of_text / "x.jsonl").unlink()
    code, out, err = run_cli("evaluate", run, "--files", folder_of_text, "--max-tokens", 10)
    assert code == 0
    assert "left out" in err
    assert "binary.bin is binary" in err
    code, _, err = run_cli("generate", run, "--prompt", "the router", "--max-new-tokens", 100)
    assert code == 2
    assert "100 new ones are more than the model's context of 16 tokens" in err


def test_a_full_disk_is_one_sentence(run_cli, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr(training, "load_model", full)
    code, _, err = run_cli("evaluate", "run")
    assert code == 2
    assert err == "tinyexperts: [Errno 28] No space left on device: 'runs/x/metrics.jsonl'\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data", "prepare", "--corpus", "wikitext103"], "wikitext-103"),
        (["data", "prepare", "--files", "nowhere.txt"], "nowhere.txt"),
        (["data", "verify", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere is not the folder of a run"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere is not the folder of a run"),
        (["train", "peer", "--num-steps", "5"], "exactly one of num_steps and training_flops, got 5 and"),
        (["train", "peer", "--data", "nowhere"], "nowhere"),
        (["evaluate", "run", "--files", "a", "--data", "b"], "give either --data or --files, got b and 1 files"),
        (["evaluate", "run", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["evaluate", "run", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["evaluate", "run", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["evaluate", "run", "--device", "meta"], "device must be auto or one of cpu, cuda, mps, xpu, got 'meta'"),
        (["generate", "run", "--prompt", "x", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["generate", "run", "--prompt", "x", "--seed", str(2**63)], "--seed must be between 0 and 2^63 - 1"),
        (["generate", "run", "--prompt", "\udcff"], "the prompt must be UTF-8"),
        (["train", "peer", "--seed", str(2**64)], "seed must be between 0 and 2^63 - 1"),
        (
            ["train", "peer", "--model.sparse-layer.num-experts", "1000"],
            "got 1000; the nearest squares are 961 and 1024",
        ),
        (["train", "peer", "--model.d-model", "63"], "d_model must be a multiple of"),
        (["study", "demo", "--training-flops", "0"], "training_flops must be positive, got 0"),
        (["study", "report"], "at least one run folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run_cli, monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*arguments)
    assert code == 2
    assert sentence in out + err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "per"], "per"),
        (["train", "peer", "--num-steps", "x"], "--num-steps"),
        (["train", "peer", "--model.dmodel", "3"], "--model.d-model"),
        (["fly"], "fly"),
    ],
)
def test_the_parser_refuses_with_exit_code_2(run_cli, arguments, sentence):
    code, out, err = run_cli(*arguments)
    assert code == 2
    assert sentence in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in out + err


def test_the_recipes_are_the_four_kinds(run_cli):
    code, out, _ = run_cli("train", "--help")
    assert code == 0
    for name in ("peer", "dense", "expert-choice-moe", "product-key-memory"):
        assert name in out


def test_python_m_tinyexperts_runs():
    result = subprocess.run([sys.executable, "-m", "tinyexperts", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in result.stdout
