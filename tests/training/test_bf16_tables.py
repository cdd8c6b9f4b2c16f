"""Runs that keep their tables in bf16: trained, resumed, evaluated, taught, quantized and exported as such."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from tinyexperts.data import PrepareConfig, prepare
from tinyexperts.errors import InputError
from tinyexperts.hub.export import export_run, import_run
from tinyexperts.layers import PEER
from tinyexperts.layers.table_layer import TableLayer, store_tables_in_bf16_
from tinyexperts.ops.row_adam.rounding import NUM_SEEDS
from tinyexperts.optim import RowSparseAdam, build_optimizers, expected_touched_share
from tinyexperts.planning import Devices, account, plan
from tinyexperts.training import TeachConfig, evaluate_run, load_model, loop, quantize_run, recipes, teach_run, train
from tinyexperts.training.checkpoint import checkpoints
from tinyexperts.training.config import with_settings
from tinyexperts.training.run import choose_table_gradients, make_run

BF16 = {"table_dtype": "bf16"}


def tables_of(model):
    return [module.experts for module in model.modules() if isinstance(module, TableLayer)]


def stored_tensors(run):
    tensors = {}
    for path in checkpoints(run)[-1].glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_a_run_keeps_its_tables_in_bf16_and_goes_on_to_the_same_bits(make_config, tmp_path, kind):
    whole = make_config(kind, run=tmp_path / "whole", optimizer=BF16, log_every=1)
    train(whole, progress=False)
    stopped = replace(whole, run=tmp_path / "stopped", num_steps=8)
    run = make_run(stopped)
    optimizer = run.optimizers[-1]
    assert isinstance(optimizer, RowSparseAdam)
    (group,) = optimizer.param_groups
    assert (group["fused"], group["stochastic_rounding"], group["seed"]) == (True, True, stopped.seed % NUM_SEEDS)
    train_until(stopped, 5)
    train(stopped, resume=True, progress=False)
    tensors, expected = stored_tensors(stopped.run), stored_tensors(whole.run)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
        if name.endswith(".experts"):
            assert tensor.dtype == torch.bfloat16
        if name.endswith(("experts.exp_avg", "experts.exp_avg_sq")):
            assert tensor.dtype == torch.float32
    model = load_model(whole.run)
    for table in tables_of(model):
        assert table.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}


def train_until(config, step):
    """Train a run, and leave it as a death after a step would."""
    right = loop.optimizer_step

    def dies(run, number):
        if number == step:
            raise KeyboardInterrupt
        return right(run, number)

    with patch.object(loop, "optimizer_step", dies), pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    assert checkpoints(config.run)[-1].name < f"step-{config.num_steps:08d}"


def test_the_first_loss_is_that_of_fp32_and_later_ones_are_close(make_config, tmp_path):
    found = {}
    for dtype in ("fp32", "bf16"):
        config = make_config(run=tmp_path / dtype, log_every=1, num_steps=40, optimizer={"table_dtype": dtype})
        train(config, progress=False)
        found[dtype] = losses(config.run)
    assert found["bf16"][0] == pytest.approx(found["fp32"][0], rel=1e-3)
    assert found["bf16"] == pytest.approx(found["fp32"], rel=3e-2)
    assert found["bf16"] != found["fp32"]


def test_such_a_run_is_evaluated_quantized_exported_and_imported(make_config, tmp_path):
    config = make_config(optimizer=BF16)
    train(config, progress=False)
    loss = evaluate_run(config.run).evaluation.summary()["loss"]
    quantized = quantize_run(config.run, tmp_path / "int8", bits=8)
    assert (quantized.before.bits, quantized.after.bits) == (16, 8)
    assert [table.dtype for table in tables_of(load_model(tmp_path / "int8"))] == [torch.int8]
    export_run(config.run, tmp_path / "exported", license_id="mit")
    import_run(tmp_path / "exported", tmp_path / "imported")
    imported, own = (tables_of(load_model(folder)) for folder in (tmp_path / "imported", config.run))
    assert all(torch.equal(*pair) for pair in zip(imported, own, strict=True))
    stored = stored_tensors(tmp_path / "imported")
    assert [tensor.dtype for name, tensor in stored.items() if name.endswith(".experts")] == [torch.bfloat16]
    assert evaluate_run(tmp_path / "imported", data=config.data).evaluation.summary()["loss"] == pytest.approx(
        loss, rel=1e-6
    )


def test_a_run_with_tables_in_bf16_is_taught(make_config, tmp_path):
    (tmp_path / "t.csv").write_text("name,color\n" + "".join(f"k{n},{'red' if n % 3 else 'blue'}\n" for n in range(40)))
    prepare(PrepareConfig(facts=tmp_path / "t.csv", key="name", output=tmp_path / "facts", vocab_size=310))
    model = {"vocab_size": 310, "context_length": 48}
    base = make_config(data=tmp_path / "facts", model=model, optimizer=BF16, validation_tokens=2**17)
    train(base, progress=False)
    (tmp_path / "new.csv").write_text(
        "name,color\n" + "".join(f"n{n},{'red' if n % 2 else 'blue'}\n" for n in range(9))
    )
    options = {"facts": tmp_path / "new.csv", "key": "name", "output": tmp_path / "taught", "passes": 2, "threads": 1}
    teach_run(base.run, TeachConfig(**options, sample_tokens=3000), progress=False)
    (before,), (after,) = (tables_of(load_model(run)) for run in (base.run, tmp_path / "taught"))
    assert before.dtype == after.dtype == torch.bfloat16
    assert not torch.equal(before, after)


def test_the_setting_is_refused_where_it_can_not_be_kept(make_config):
    with pytest.raises(InputError, match="bf16 needs sparse table gradients, got table_gradients dense"):
        make_config(optimizer={"table_gradients": "dense", **BF16})
    config = make_config(optimizer=BF16)
    with pytest.raises(InputError, match="bf16 is for one process, got 4 ranks"):
        plan(config, Devices.parse("4x80GB"))
    layer = PEER(16, 64, num_heads=2, experts_per_head=3)
    rates = {"matrix_lr": 1e-3, "embedding_lr": None, "head_lr": None, "vector_lr": 1e-3}
    with pytest.raises(InputError, match="for sparse tables, got sparse_tables=False"):
        build_optimizers(layer, sparse_tables=False, **rates, table_rounding_seed=1)
    with pytest.raises(InputError, match=r"for bf16 tables, got one of torch.float32"):
        build_optimizers(layer, sparse_tables=True, **rates, table_rounding_seed=1)
    layer.quantize_(8)
    with pytest.raises(InputError, match="quantized to 8 bits"):
        layer.store_in_bf16_()
    store_tables_in_bf16_(layer)
    assert layer.table_bits == 8


def test_gradients_are_sparse_on_any_device(make_config):
    gpu = torch.device("cuda")  # named only
    assert choose_table_gradients(make_config(), gpu)[0] is False
    assert choose_table_gradients(make_config(optimizer=BF16), gpu)[0] is True


def test_a_plan_counts_half_the_bytes_of_tables(make_config):
    devices = Devices.parse("1x80GB")
    fp32 = with_settings(make_config(optimizer={"table_gradients": "sparse"}), {"device": "cuda"})
    bf16 = with_settings(fp32, {"optimizer.table_dtype": "bf16"})
    (wide,), (narrow,) = plan(fp32, devices), plan(bf16, devices)
    table_numbers = sum(table.numel() for table in tables_of(make_run(with_settings(fp32, {"device": "cpu"})).model))
    assert wide.memory.weights - narrow.memory.weights == 2 * table_numbers
    assert wide.memory.moments == narrow.memory.moments
    assert wide.memory.gradients > narrow.memory.gradients
    rows = 6 * 2 * 16  # retrieved * vectors * width
    # Two bytes less: of the rows that both passes read, and of the value and the gradient that a step reads and writes.
    touched = table_numbers * expected_touched_share(fp32.tokens_per_step, 6, 64)
    saved = 2 * 2 * fp32.tokens_per_step * rows + 4 * 2 * touched
    assert wide.memory_seconds - narrow.memory_seconds == pytest.approx(saved / devices.memory_speed)
    assert account(fp32).forward_bytes - account(bf16).forward_bytes == 2 * rows


def test_the_recipe_for_a_gpu_fits_one_and_trains_its_table_in_bf16(tiny_data, tmp_path):
    recipe = recipes.gpu()
    layer = recipe.model.expert_layer
    assert (layer.num_experts, layer.num_heads, layer.experts_per_head) == (1024**2, 8, 16)
    (whole,) = plan(recipe, Devices.parse("1x24GB"))
    assert whole.memory.total < 24e9
    small = {
        "run": tmp_path / "run",
        "data": tiny_data,
        "device": "cpu",
        "num_steps": 3,
        "training_flops": None,
        "batch_size": 2,
        "validation_tokens": 64,
        "model.vocab_size": 300,
        "model.context_length": 16,
        "model.d_model": 16,
        "model.num_layers": 3,
        "model.num_heads": 2,
        "model.expert_layer": replace(layer, num_experts=64, num_heads=2, experts_per_head=3, query_dim=6),
    }
    config = with_settings(recipe, small)
    run = make_run(replace(config, run=tmp_path / "start"))
    before = [table.detach().clone() for table in tables_of(run.model)]
    train(config, progress=False)
    (table,) = tables_of(load_model(config.run))
    assert table.dtype == torch.bfloat16
    assert (table.detach() != before[0]).any()
