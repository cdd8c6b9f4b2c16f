"""Transformers with quantized tables: their config in files, their checkpoints, and what refuses to train them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tinyexperts.data import TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.evaluation import evaluate
from tinyexperts.model import Transformer
from tinyexperts.planning.model_costs import account, count_costs
from tinyexperts.training import load_model, train
from tinyexperts.training.checkpoint import checkpoints, save_checkpoint
from tinyexperts.training.config_file import from_json, to_json
from tinyexperts.training.run_folder import read_config

each_bits = pytest.mark.parametrize("bits", [8, 4])


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@each_bits
@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_a_quantized_model_is_saved_and_loaded_without_a_table_of_numbers(make_config, kind, bits, monkeypatch):
    config = make_config(kind, num_steps=3)
    train(config, progress=False)
    model = load_model(config.run)
    tokens = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    model.quantize_(bits)
    assert model.config == replace(model.config, expert_layer=replace(config.model.expert_layer, table_bits=bits))
    logits = model(tokens)
    assert 0 < (logits - before).norm() < (0.01 if bits == 8 else 0.1) * before.norm()
    # A run folder of the quantized model.
    (config.run / "config.json").write_text(to_json(replace(config, model=model.config)))
    save_checkpoint(config.run, 4, model, [], {}, keep=1)
    monkeypatch.setattr(Transformer, "quantize_", None)
    found = load_model(config.run)
    assert tensors_of(found).keys() == tensors_of(model).keys()
    for name, tensor in tensors_of(model).items():
        assert torch.equal(found.state_dict()[name], tensor), name
        assert found.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(found(tokens), logits)
    assert found.num_parameters() == Transformer(config.model).num_parameters()
    assert count_costs(model.config).forward_flops == count_costs(config.model).forward_flops
    saved = account(config).forward_bytes - account(replace(config, model=model.config)).forward_bytes
    num_vectors, retrieved = model.blocks[1].feed_forward.experts.shape[1], 6
    assert saved == retrieved * num_vectors * (16 * 4 - (16 + 4 if bits == 8 else 8 + 2))
    assert len(checkpoints(config.run)) == 1
    split = TokenDataset.open(config.data).split("validation")
    assert evaluate(found, split, max_tokens=64).summary()["num_tokens"] == 64


@pytest.mark.parametrize("kind", ["peer", "pkm", "dense"])
def test_configs_without_quantized_tables_are_written_as_before(make_config, kind):
    content = json.loads(to_json(make_config(kind)))
    assert "table_bits" not in content["model"]["expert_layer"]
    assert from_json(json.dumps(content)) == make_config(kind)


@each_bits
def test_the_bits_survive_the_config_file(make_config, bits):
    config = make_config()
    config = replace(
        config, model=replace(config.model, expert_layer=replace(config.model.expert_layer, table_bits=bits))
    )
    assert json.loads(to_json(config))["model"]["expert_layer"]["table_bits"] == bits
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize("bits", ["5", "16", '"four"', "8.5"])
def test_other_bits_are_refused_in_a_config_file(make_config, bits):
    text = to_json(make_config()).replace('"kind": "peer",', f'"kind": "peer", "table_bits": {bits},')
    with pytest.raises(InputError, match=r"model\.expert_layer\.table_bits: Input should be 8 or 4"):
        from_json(text)


def test_a_quantized_table_is_not_trained(make_config, run_cli):
    config = make_config()
    config = replace(config, model=replace(config.model, expert_layer=replace(config.model.expert_layer, table_bits=8)))
    with pytest.raises(InputError, match=r"a quantized table is not trained: model\.expert_layer\.table_bits is 8"):
        train(config, progress=False)
    assert not config.run.exists()
    options = ("--run", config.run, "--data", config.data, "--model.expert-layer.table-bits", 4)
    code, out, err = run_cli("train", "peer", *options, "--model.vocab-size", 300)
    assert (code, out) == (2, "")
    assert err == "tinyexperts: a quantized table is not trained: model.expert_layer.table_bits is 4\n"
    assert not config.run.exists()


def test_a_dense_model_has_nothing_to_quantize(make_config):
    model = Transformer(make_config("dense").model)
    with pytest.raises(InputError, match="Transformer has none"):
        model.quantize_(8)
    assert model.config == make_config("dense").model


def test_a_quantized_run_is_not_taught(make_config, run_cli, tmp_path):
    config = make_config(num_steps=3)
    train(config, progress=False)
    model = load_model(config.run)
    model.quantize_(8)
    (config.run / "config.json").write_text(to_json(replace(read_config(config.run), model=model.config)))
    save_checkpoint(config.run, 4, model, [], {}, keep=1)
    for way in ("tables", "everything", "low-rank"):
        options = ("--data", config.data, "--train", way, "--output", tmp_path / "taught")
        code, _, err = run_cli("teach", config.run, *options)
        assert code == 2
        assert "a quantized table is not trained" in err
        assert not (tmp_path / "taught").exists()
