"""`tinyexperts quantise`: another run with tables of integers, measured beside the first."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tinyexperts.data import TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.evaluation import evaluate
from tinyexperts.training import evaluate_run, generate_text, load_model, quantize_run, train
from tinyexperts.training.run_folder import read_config


@pytest.fixture(params=["peer", "pkm"])
def run(request, make_config):
    config = make_config(request.param, num_steps=6)
    train(config, progress=False)
    return config.run


@pytest.mark.parametrize(("bits", "row_bytes"), [(8, 16 + 4), (4, 8 + 2)])
def test_the_new_run_is_the_old_one_with_other_tables(run, bits, row_bytes, tmp_path):
    found = quantize_run(run, tmp_path / "small", bits=bits, threads=1)
    expected = load_model(run)
    expected.quantize_(bits)
    small = load_model(tmp_path / "small")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name
    vectors = small.blocks[1].feed_forward.experts.shape[1]
    assert found.before.bits == 32
    assert found.after.bits == bits
    assert (found.before.table_bytes, found.after.table_bytes) == (64 * vectors * 64, 64 * vectors * row_bytes)
    assert (found.before.bytes_per_token, found.after.bytes_per_token) == (6 * vectors * 64, 6 * vectors * row_bytes)
    assert min(found.before.tokens_per_second, found.after.tokens_per_second) > 0
    assert found.remarks == ()
    split = TokenDataset.open(read_config(run).data).split("validation")
    for model, tables in ((load_model(run), found.before), (small, found.after)):
        assert tables.evaluation.summary() == evaluate(model, split).summary()
    kept = json.loads((tmp_path / "small" / "evaluation.json").read_text())
    assert kept["loss"] == found.after.evaluation.summary()["loss"]
    assert evaluate_run(tmp_path / "small").evaluation.summary() == found.after.evaluation.summary()
    assert isinstance(generate_text(tmp_path / "small", "the cat"), str)


def test_the_old_run_stays_and_the_new_one_is_not_trained(run, tmp_path, run_cli):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    quantize_run(run, tmp_path / "small")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="a quantized table is not trained"):
        train(read_config(tmp_path / "small"), resume=True)


def test_without_its_data_a_run_is_quantized_and_not_measured(run, tmp_path, tiny_data, run_cli):
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(content | {"data": "gone"}))
    code, out, err = run_cli("quantise", run, "--output", tmp_path / "small")
    assert code == 0, err
    assert "not evaluated: the run's data set gone is gone" in " ".join(out.split())
    assert "perplexity" not in out
    assert not (tmp_path / "small" / "evaluation.json").exists()
    code, out, err = run_cli("quantise", run, "--output", tmp_path / "other", "--bits", 4, "--data", tiny_data)
    assert code == 0, err
    assert "perplexity" in out


def test_bad_input(make_config, run, tmp_path, run_cli, tiny_data):
    with pytest.raises(InputError, match="table_bits must be 8 or 4, got 3"):
        quantize_run(run, tmp_path / "small", bits=3)
    code, _, err = run_cli("quantise", run, "--output", run)
    assert (code, err) == (2, f"tinyexperts: the folder {run} exists: choose another\n")
    quantize_run(run, tmp_path / "small")
    code, _, err = run_cli("quantise", tmp_path / "small", "--output", tmp_path / "smaller")
    assert code == 2
    assert "a table is quantized once, got one that has 8 bits" in err
    shutil.rmtree(run)
    train(make_config("dense", num_steps=1), progress=False)
    with pytest.raises(InputError, match="Transformer has none"):
        quantize_run(run, tmp_path / "none")
    with pytest.raises(InputError, match="is not the folder of a run"):
        quantize_run(tmp_path / "nothing", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_ask_finds_the_model_that_make_model_makes(run, tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("ask", "the cat")
    assert (code, err) == (
        2,
        "tinyexperts: there is no runs/airports-int8, which `make model` makes: give the folder of a run first\n",
    )
    code, _, err = run_cli("ask", run)
    assert (code, err) == (2, f"tinyexperts: after the run {run} a question is missing, such as 'The city of SFO is'\n")
    quantize_run(run, "runs/airports-int8")
    code, out, err = run_cli("ask", "the cat")
    assert code == 0, err
    assert out == run_cli("ask", "runs/airports-int8", "the cat")[1]
