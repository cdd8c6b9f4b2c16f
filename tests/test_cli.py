"""The command line as a newcomer uses it: text to a trained, measured, speaking model; bad input in one sentence."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tinyexperts
from tinyexperts import training
from tinyexperts.cli import parser
from tinyexperts.study.all_studies import STUDIES
from tinyexperts.training import loop
from tinyexperts.training.recipes import RECIPES

TINY_MODEL = [
    *("--model.vocab-size", 300, "--model.context-length", 16, "--model.d-model", 16, "--model.num-layers", 2),
    *("--model.num-heads", 2, "--model.expert-layer.num-experts", 64, "--model.expert-layer.num-heads", 2),
    *("--model.expert-layer.experts-per-head", 3, "--model.expert-layer.query-dim", 6),
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
    assert "20 steps on cpu in fp32, blocks not compiled; numba kernels; table gradients sparse" in " ".join(
        err.split()
    )
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

    monkeypatch.setattr(training, "evaluate_run", full)
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
        (["evaluate", "run", "--files", "a", "--data", "b"], "give either data or files, got b and 1 files"),
        (["evaluate", "run", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["evaluate", "run", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["evaluate", "run", "--threads", "0"], "threads must be at least 1, got 0"),
        (["evaluate", "run", "--device", "meta"], "device must be auto or one of cpu, cuda, mps, xpu, got 'meta'"),
        (["generate", "run", "--prompt", "x", "--threads", "0"], "threads must be at least 1, got 0"),
        (["generate", "run", "--prompt", "x", "--seed", str(2**63)], "seed must be between 0 and 2^63 - 1"),
        (["generate", "run", "--prompt", "\udcff"], "the prompt must be UTF-8"),
        (["train", "peer", "--seed", str(2**64)], "seed must be between 0 and 2^63 - 1"),
        (
            ["train", "peer", "--model.expert-layer.num-experts", "1000"],
            "got 1000; the nearest squares are 961 and 1024",
        ),
        (["train", "peer", "--model.d-model", "63"], "d_model must be a multiple of"),
        (["study", "demo", "--training-flops", "0"], "training_flops must be positive, got 0"),
        (["study", "report"], "at least one run folder"),
        (["train", "peer", "--run", "r\udcff"], "run must be a path in UTF-8, got b'r\\xff'"),
        (["train", "peer", "--data", "\udcff/d"], "data must be a path in UTF-8, got b'\\xff/d'"),
        (["plan", "peer", "--devices", "1x1GB", "--run", "\udcff"], "run must be a path in UTF-8, got b'\\xff'"),
        (["evaluate", "r\udcff"], "run must be a path in UTF-8, got b'r\\xff'"),
        (["generate", "r\udcff", "--prompt", "x"], "run must be a path in UTF-8, got b'r\\xff'"),
        (["study", "demo", "--output", "\udcff"], "output must be a path in UTF-8, got b'\\xff'"),
        (["study", "isoflop", "--output", "\udcff"], "output must be a path in UTF-8, got b'\\xff'"),
        (["study", "isoflop", "--data", "\udcff"], "data must be a path in UTF-8, got b'\\xff'"),
        (["bench", "layer", "--output", "\udcff"], "output must be a path in UTF-8, got b'\\xff'"),
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


KINDS = {
    "peer": ["--model.expert-layer.num-experts", 64, "--model.expert-layer.experts-per-head", 3],
    "dense": ["--model.expert-layer.hidden-dim", 24],
    "expert-choice-moe": ["--model.expert-layer.num-experts", 4, "--model.expert-layer.hidden-dim", 8],
    "product-key-memory": ["--model.expert-layer.num-experts", 64, "--model.expert-layer.experts-per-head", 3],
}


@pytest.fixture
def begun(run_cli, tiny_data, tmp_path, monkeypatch):
    """A function that trains two of four steps of a recipe, with settings of all kinds; returns the command."""

    def begin(recipe, *more):
        command = [
            *("train", recipe, "--data", tiny_data, "--training-flops", "None", "--num-steps", 4, "--threads", 1),
            *("--model.vocab-size", 300, "--model.context-length", 16, "--model.d-model", 16, "--model.num-layers", 2),
            *(
                "--model.num-heads",
                2,
                "--model.expert-blocks",
                0,
                1,
                "--model.tied-embeddings",
                "--optimizer.betas",
                0.5,
                0.75,
            ),
            *(
                "--checkpoint.every",
                2,
                "--optimizer.table-learning-rate",
                0.003,
                "--optimizer.gradient-clip",
                "None",
                *KINDS[recipe],
                *more,
            ),
        ]
        optimizer_step = loop.optimizer_step

        def stopped(run, step):
            if step == 1:
                signal.raise_signal(signal.SIGTERM)
            return optimizer_step(run, step)

        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "optimizer_step", stopped)
            code, _, err = run_cli(*command)
        assert code == 130, err
        return command

    return begin


def course(run):
    """Its configuration and the losses of its steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "config.json").read_text()), [(line["step"], line["loss"]) for line in lines]


@pytest.mark.parametrize("recipe", KINDS)
def test_a_run_resumes_with_all_of_its_own_settings(run_cli, begun, tmp_path, recipe):
    command = begun(recipe, "--run", "r1")
    shutil.copytree("r1", "r2")
    assert run_cli("train", recipe, "--run", "r1", "--resume")[0] == 0
    code, _, err = run_cli(*command[:2], "--run=r2", *command[2:-2], "--resume", "--no-progress")  # as it was begun
    assert (code, err) == (0, "")
    settings, losses = course(tmp_path / "r1")
    assert settings["run"] == "r1"
    assert settings["model"]["expert_blocks"] == [0, 1]
    assert [step for step, _ in losses] == [4, 4]
    assert losses == course(tmp_path / "r2")[1]


def test_a_run_in_the_folder_of_its_recipe_resumes_too(run_cli, begun, tmp_path):
    begun("peer")
    assert run_cli("train", "peer", "--resume")[0] == 0
    assert course(tmp_path / "runs/peer")[1][-1][0] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dense", "--run", "r1"], "r1 is a run of peer, which train peer --run r1 --resume continues, got dense"),
        (["peer", "--run", "r1", "--seed", "1"], "r1 can't be resumed with another configuration: seed was 0, is 1"),
        # the recipe's own settings, typed, are not those of the run
        (["peer", "--run=r1", "--model.d-model=64"], "model.d_model was 16, is 64"),
        (
            ["peer", "--run", "r1", "--optimizer.betas", "0.9", "0.98"],
            "optimizer.betas was (0.5, 0.75), is (0.9, 0.98)",
        ),
        (["peer", "--run", "r1", "--num-steps", "9"], "num_steps was 4, is 9"),
        (["peer", "--run", "r1", "--training-flops", "1e9"], "exactly one of num_steps and training_flops"),
        (["peer", "--run", "r1", "--data", "nowhere"], "nowhere"),
        (
            ["peer", "--run", "r1", "--distributed.mesh", "2", "1"],
            "mesh must multiply up to the number of ranks, 1, got 2 x 1",
        ),
        (["peer"], "runs/peer is not the folder of a run"),
        (["peer", "--run", "nowhere"], "nowhere is not the folder of a run"),
        (["peer", "--run", "broken"], "broken/config.json does not hold a configuration"),
        (["peer", "--run", "\udcff"], "run must be a path in UTF-8, got b'\\xff'"),
    ],
)
def test_what_a_run_can_not_go_on_with_is_one_sentence(run_cli, begun, tmp_path, arguments, sentence):
    begun("peer", "--run", "r1")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    before = course(tmp_path / "r1")
    code, out, err = run_cli("train", *arguments, "--resume")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
    assert course(tmp_path / "r1") == before
    assert not (tmp_path / "runs").exists()


def test_the_folder_of_a_run_may_change(run_cli, begun, tiny_data, tmp_path):
    begun("peer", "--run", "r1")
    shutil.copytree(tiny_data, "moved")
    Path("r1").rename("r9")
    given = ["--data", "moved", "--distributed.timeout-seconds", 5, "--checkpoint.asynchronous"]
    assert run_cli("train", "peer", "--resume", "--run", "r9", *given)[0] == 0
    assert course(tmp_path / "r9")[1][-1][0] == 4
    assert not Path("r1").exists()


def test_the_help_of_a_resumption_shows_the_settings_of_the_run(run_cli, begun):
    begun("peer", "--run", "r1")
    code, out, _ = run_cli("train", "peer", "--run", "r1", "--resume", "--help")
    assert code == 0
    assert "(default: 0.003)" in out
    assert "(default: 0.003)" not in run_cli("train", "peer", "--run", "r1", "--no-resume", "--help")[1]


@pytest.mark.parametrize("arguments", [["--run"], ["--resume", "--run"], ["--run", "--resume"]])
def test_a_run_without_a_name_is_left_to_the_parser(run_cli, arguments):
    code, out, err = run_cli("train", "peer", *arguments)
    assert code == 2
    assert "--run" in out + err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "replace"])
def test_what_a_terminal_can_not_show_is_escaped(run_cli, begun, monkeypatch, encoding, errors):
    begun("peer", "--run", "r1")
    prompt = "\u00e4 \u20ac \U0001f600"
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code, _, _ = run_cli("generate", "r1", "--prompt", prompt, "--max-new-tokens", 1, "--temperature", 0)
        assert code == 0
        code, _, _ = run_cli("evaluate", "r1", "--data", prompt)
        assert code == 2
    how = errors if errors == "replace" else "backslashreplace"
    assert out.buffer.getvalue().startswith(prompt.encode(encoding, how))
    err.flush()
    assert prompt.encode(encoding, how) in err.buffer.getvalue()


def test_without_a_standard_output_a_verb_still_runs(run_cli, begun, monkeypatch):
    begun("peer", "--run", "r1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        code, _, _ = run_cli("generate", "r1", "--prompt", "the", "--save")
    assert code == 0
    assert len(json.loads(Path("r1/samples.json").read_text())) == 1


@pytest.mark.parametrize(
    ("ending", "unbuffered", "code", "shown"),
    [
        ("| true", "", 141, ""),
        ("> /dev/full", "", 2, "tinyexperts: [Errno 28] No space left on device\n"),
        pytest.param("| true", "1", 141, "", marks=pytest.mark.slow),
        pytest.param("> /dev/full 2> /dev/full", "", 2, "", marks=pytest.mark.slow),
        pytest.param(">&-", "", 0, "", marks=pytest.mark.slow),
    ],
)
def test_an_output_that_takes_nothing_ends_without_a_traceback(begun, ending, unbuffered, code, shown):
    begun("peer", "--run", "r1")
    generate = f"{shlex.quote(sys.executable)} -m tinyexperts generate r1 --prompt the --max-new-tokens 2"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {generate} {ending}"],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, shown)


def test_a_pipe_that_breaks_elsewhere_is_reported(run_cli, monkeypatch):
    def broken(*arguments, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe", "a socket")

    monkeypatch.setattr(training, "evaluate_run", broken)
    assert run_cli("evaluate", "run") == (2, "", "tinyexperts: [Errno 32] Broken pipe: 'a socket'\n")


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
def test_the_tiniest_option_takes_the_likeliest_token(run_cli, begun, option):
    begun("peer", "--run", "r1")
    expected = run_cli("generate", "r1", "--prompt", "the", "--temperature", 0)
    assert expected[0] == 0
    for value in ("1e-30", "1e-46", "1e-300"):
        assert run_cli("generate", "r1", "--prompt", "the", option, value) == expected
    assert run_cli("generate", "r1", "--prompt", "the", option, "nan")[0] == 2


def test_the_studies_of_the_command_line_are_all_studies_with_their_summaries():
    assert list(parser.STUDIES.items()) == [(study.name, study.summary) for study in STUDIES]


def test_the_recipes_are_the_four_kinds_and_one_for_a_gpu(run_cli):
    assert list(parser.RECIPES) == list(RECIPES)
    for verb in ("train", "plan"):
        code, out, _ = run_cli(verb, "--help")
        assert code == 0
        assert [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "] == [
            "peer",
            "dense",
            "expert-choice-moe",
            "product-key-memory",
            "gpu",
        ]


def test_python_m_tinyexperts_runs():
    result = subprocess.run([sys.executable, "-m", "tinyexperts", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in result.stdout


HEAVY = {"torch", "numba", "matplotlib", "pandas", "scipy"}


def heavy_imports(*arguments: object) -> set[str]:
    """The heavy packages that a process of the command line has imported when it ends."""
    run = "\n".join(
        [
            "import sys",
            "from tinyexperts.cli import main",
            f"sys.argv = ['tinyexperts', *{list(map(str, arguments))}]",
            "try:",
            "    main()",
            "except SystemExit:",
            "    pass",
            "print('IMPORTED', *sys.modules)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    return HEAVY & set(done.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize(
    "words",
    [
        *([], ["--help"], ["--version"], ["trian"], ["data", "--help"], ["evaluate", "--help"], ["data", "verfy"]),
        *(["train", "--help"], ["plan", "--help"], ["train", "pear"]),
    ],
)
def test_help_and_misspelt_verbs_import_nothing_heavy(words):
    assert heavy_imports(*words) == set()


def test_a_data_set_is_verified_and_a_study_shown_without_torch(tiny_data, tmp_path, run_cli):
    (tmp_path / "planned").mkdir()
    study = {"study": "isoflop", "scale": "minute", "data": str(tiny_data), "evaluation_corpora": []}
    (tmp_path / "study.json").write_text(json.dumps(study))
    (tmp_path / "planned/one.json").write_text("{}")
    assert run_cli("data", "verify", tiny_data)[0] == 0
    code, out, _ = run_cli("study", "status", tmp_path)
    assert code == 0
    assert "1 runs planned so far, 0 done, 0 running, 0 begun, 1 waiting, 0 failed" in out
    assert heavy_imports("data", "verify", tiny_data) == set()
    assert heavy_imports("study", "status", tmp_path) == set()
    assert "torch" in heavy_imports("train", "peer", "--help")  # the probe sees what is imported


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["trian"],
            "no verb 'trian', did you mean 'train'? tinyexperts has the verbs data, train, teach, plan, evaluate, ",
        ),
        (
            ["data", "verfy"],
            "no verb 'verfy', did you mean 'verify'? tinyexperts data has the verbs fetch, fetch-tasks, ",
        ),
        (["study", "isoflops"], "no verb 'isoflops', did you mean 'isoflop'? tinyexperts study has the verbs demo, "),
        (["xyz"], "no verb 'xyz': tinyexperts has the verbs data, "),
        ([], "a verb is missing: tinyexperts has the verbs data, "),
        (["train", "pear"], "no recipe 'pear', did you mean 'peer'? tinyexperts train has the recipes peer, dense, "),
        (["bench"], "a verb is missing: tinyexperts bench has the verbs layer, tables, and tinyexperts bench --help"),
    ],
)
def test_a_misspelt_or_missing_verb_is_one_sentence_with_the_verbs(run_cli, words, sentence):
    code, out, err = run_cli(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"tinyexperts: {sentence}")


def test_help_shows_each_verb_with_its_first_line(run_cli):
    code, out, err = run_cli("--help")
    assert (code, err) == (0, "")
    assert "Download texts, prepare data sets of tokens, verify them." in out
    assert "Continue a text with a trained model." in out
    assert "Check a data set's files against their checksums" in run_cli("data", "--help")[1]
    assert "Show a progress bar." in run_cli("train", "peer", "--help")[1]
    assert "isoflop" in run_cli("study", "--help")[1]


def test_the_version_is_printed(run_cli):
    assert run_cli("--version") == (0, f"tinyexperts {tinyexperts.__version__}\n", "")
