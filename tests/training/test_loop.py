"""The training loop: it learns, accounts honestly, and stops with one sentence where it must."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from itertools import pairwise

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinyexperts.comparison.report import write_report
from tinyexperts.data import PrepareConfig, prepare
from tinyexperts.errors import InputError
from tinyexperts.model import Transformer
from tinyexperts.optim import RowSparseAdam
from tinyexperts.training import checkpoint, load_model, loop, run_folder, train
from tinyexperts.training.config import with_settings
from tinyexperts.training.device import choose_device, choose_precision
from tinyexperts.training.run import choose_table_gradients, make_run
from tinyexperts.training.step import optimizer_step


def lines(run, split):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


@pytest.mark.parametrize("kind", ["dense", "moe", "pkm", "peer"])
def test_every_kind_learns_and_its_metrics_add_up(make_config, kind):
    config = make_config(kind, num_steps=60, log_every=5, validation_every=30, schedule={"shape": "cosine"})
    train(config, progress=False)
    rows = lines(config.run, "train")
    assert [row["step"] for row in rows] == list(range(5, 61, 5))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    model = load_model(config.run)
    for row in rows:
        assert row["num_tokens"] == row["step"] * config.tokens_per_step
        assert row["training_flops"] == 3 * model.flops_per_token(16) * row["num_tokens"]
    assert all(late["seconds"] > early["seconds"] for early, late in pairwise(rows))
    assert [row["step"] for row in lines(config.run, "validation")] == [30, 60]
    run = json.loads((config.run / "run.json").read_text())
    assert run["num_parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert run["training_flops_per_token"]["total"] == 3 * model.flops_per_token(16)
    assert (run["training_flops_per_token"]["router"] > 0) == (kind != "dense")


def test_a_line_of_metrics_is_the_mean_of_its_steps(make_config, tmp_path):
    rows = {}
    for log_every in (1, 3):
        config = make_config(log_every=log_every, run=tmp_path / f"{log_every}")
        train(config, progress=False)
        rows[log_every] = lines(config.run, "train")
    single = [row["loss"] for row in rows[1]]
    assert [row["loss"] for row in rows[3]] == pytest.approx(
        [sum(s) / len(s) for s in (single[:3], single[3:6], single[6:])]
    )
    assert [row["step"] for row in rows[3]] == [3, 6, 8]


def test_the_number_of_steps_is_what_the_flops_pay_for(make_config):
    config = make_config()
    flops_per_step = 3 * Transformer(config.model).flops_per_token(16) * config.tokens_per_step
    train(dataclasses.replace(config, num_steps=None, training_flops=4.5 * flops_per_step), progress=False)
    assert json.loads((config.run / "run.json").read_text())["num_steps"] == 4
    with pytest.raises(InputError, match="must pay for one step at least"):
        train(
            dataclasses.replace(config, num_steps=None, training_flops=0.9 * flops_per_step, run=config.run / "b"),
            progress=False,
        )


def test_gradient_accumulation_equals_one_large_batch(make_config, tmp_path):
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        config = make_config(
            "dense",
            run=tmp_path / f"{batch_size}",
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            log_every=1,
        )
        train(config, progress=False)
        losses.append([row["loss"] for row in lines(config.run, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sparse_and_dense_table_gradients_agree_on_the_first_steps(make_config, tmp_path, accumulation):
    # Rows without a gradient keep their moments in one and not in the other: equal at first, close later.
    losses = []
    for kind in ("sparse", "dense"):
        options = {"log_every": 1, "gradient_accumulation": accumulation, "optimizer": {"table_gradients": kind}}
        config = make_config(run=tmp_path / kind, **options)
        train(config, progress=False)
        losses.append([row["loss"] for row in lines(config.run, "train")])
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_choice_of_table_gradients_follows_the_share_of_touched_rows(make_config):
    small = make_config()
    gpu, cpu = torch.device("cuda"), torch.device("cpu")  # named only
    assert choose_table_gradients(small, gpu) == (
        False,
        "table gradients dense (AdamW): a step touches up to 100% of 64 rows",
    )
    assert choose_table_gradients(small, cpu)[0] is True
    layer = dataclasses.replace(small.model.expert_layer, num_experts=256**2)
    large = dataclasses.replace(small, model=dataclasses.replace(small.model, expert_layer=layer))
    sparse, sentence = choose_table_gradients(large, gpu)
    assert sparse
    assert "sparse (RowSparseAdam)" in sentence
    assert any(isinstance(optimizer, RowSparseAdam) for optimizer in make_run(large).optimizers)
    assert choose_table_gradients(with_settings(large, {"optimizer.table_gradients": "dense"}), cpu)[0] is False
    assert choose_table_gradients(make_config("dense"), cpu)[0] is False


def test_learning_rates_follow_the_schedule_and_the_kinds(make_config, monkeypatch):
    schedule = {"warmup_fraction": 0.1, "decay_fraction": 0.5}
    config = make_config(num_steps=20, schedule=schedule, optimizer={"table_learning_rate": 0.5})
    rates = [loop._schedule(config.schedule, step, 20) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[10] == 1.0
    assert rates[15] == 0.5
    assert rates[19] == pytest.approx(0.1)
    groups = {g["name"]: g["peak_lr"] for o in make_run(config).optimizers for g in o.param_groups}
    assert groups == {"tables": 0.5, "matrices": 4e-3, "embedding": 0.096, "head": 8e-3, "vectors": 4e-3}


def test_learning_rates_are_logged_by_their_names(make_config):
    config = make_config(log_every=1, optimizer={"table_learning_rate": 0.5})
    train(config, progress=False)
    rows = lines(config.run, "train")
    peaks = {"matrix": 4e-3, "embedding": 0.096, "head": 8e-3, "table": 0.5}
    assert {name for name in rows[0] if "learning_rate" in name} == {f"{kind}_learning_rate" for kind in peaks}
    for step, row in enumerate(rows):
        factor = loop._schedule(config.schedule, step, 8)
        assert {kind: row[f"{kind}_learning_rate"] for kind in peaks} == pytest.approx(
            {kind: factor * peak for kind, peak in peaks.items()}
        )
    run = make_run(make_config("dense", model={"tied_embeddings": True}))
    run.optimizers[0].param_groups[-1]["lr"] = 0.25
    assert loop._learning_rates(run.optimizers) == {
        "matrix_learning_rate": 4e-3,
        "embedding_learning_rate": 0.096,
        "vector_learning_rate": 0.25,
    }


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_config, monkeypatch):
    config = make_config(validation_every=100)
    real, calls = Transformer.loss, []

    def loss(model, tokens, targets):
        calls.append(1)
        return real(model, tokens, targets) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(Transformer, "loss", loss)
    sentence = r"step 5 gave a loss of nan .* on the sequences \[\d+, \d+, \d+, \d+\] of .*last good .*step-00000003"
    with pytest.raises(InputError, match=sentence):
        train(config, progress=False)
    assert len(calls) == 5
    assert [path.name for path in checkpoint.checkpoints(config.run)] == ["step-00000003"]


@pytest.mark.parametrize("kind", ["dense", "peer"])
def test_a_step_that_is_refused_leaves_every_weight_and_state_as_it_was(make_config, monkeypatch, kind):
    run = make_run(make_config(kind))
    optimizer_step(run, 0)
    before = copy.deepcopy((run.model.state_dict(), [o.state_dict()["state"] for o in run.optimizers]))
    real = Transformer.loss
    monkeypatch.setattr(Transformer, "loss", lambda *arguments: real(*arguments) * float("inf"))
    with pytest.raises(InputError, match="step 2 gave a loss of inf"):
        optimizer_step(run, 1)
    after = run.model.state_dict(), [o.state_dict()["state"] for o in run.optimizers]
    for name, parameter in run.model.named_parameters():
        assert torch.equal(before[0][name], parameter)
    assert [*map(str, before[1])] == [*map(str, after[1])]


def test_bad_input_is_refused_before_a_folder_is_made(make_config, tiny_data, tmp_path):
    config = make_config()
    for changed, message in (
        (make_config(data=tmp_path / "none"), "none"),
        (make_config(model={"vocab_size": 301}), r"must be that of .*, 300 \(--model.vocab-size 300\), got 301"),
        (make_config(model={"context_length": 100_000}), "context_length must be at most"),
        (make_config(device="gpu"), "device must be auto or one of cpu, cuda, mps, xpu, got 'gpu'"),
        (make_config(device="meta"), "got 'meta'"),
        (make_config(device="cpu:x"), "device 'cpu:x' can't be used"),
    ):
        with pytest.raises(InputError, match=message):
            train(changed, progress=False)
        assert not config.run.exists()


def test_an_existing_folder_is_left_alone(make_config):
    config = make_config()
    config.run.mkdir()
    (config.run / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists: add --resume to go on with it, or choose another --run"):
        train(config, progress=False)
    assert [path.name for path in config.run.iterdir()] == ["mine.txt"]


def test_what_a_kill_left_before_the_configuration_was_written_is_no_run(make_config):
    config = make_config(num_steps=3)
    config.run.mkdir()
    (config.run / "tokenizer.json").write_text("{}")
    (config.run / "config.json.partial").write_text("{")
    train(config, progress=False)
    assert load_model(config.run)


def test_a_changed_configuration_is_not_resumed(make_config):
    config = make_config(num_steps=3)
    train(config, progress=False)
    layer = dataclasses.replace(config.model.expert_layer, num_experts=81)
    changed = dataclasses.replace(
        config, seed=1, num_steps=4, model=dataclasses.replace(config.model, expert_layer=layer)
    )
    with pytest.raises(
        InputError, match=r"model\.expert_layer\.num_experts was 64, is 81; num_steps was 3, is 4; seed was 0, is 1"
    ):
        train(changed, resume=True, progress=False)


def test_resume_with_tokens_of_another_tokenizer_is_refused(make_config, tmp_path):
    config = make_config(num_steps=3)
    train(config, progress=False)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(
            f"quite another text, number {number} of {number * 7}, zebra quagga okapi " * 30
        )
    prepare(PrepareConfig(files=(texts,), output=tmp_path / "other", vocab_size=300))
    with pytest.raises(InputError, match="was made by another tokenizer than that of the run"):
        train(dataclasses.replace(config, data=tmp_path / "other"), resume=True, progress=False)


def test_resume_with_other_tokens_of_the_same_tokenizer_is_refused(make_config, tiny_data, tmp_path):
    config = make_config(num_steps=3)
    train(config, progress=False)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(
            f"Other text of the same tokenizer, number {number} of {number * 7}. " * 30
        )
    prepare(PrepareConfig(files=(texts,), output=tmp_path / "other", tokenizer=str(tiny_data / "tokenizer.json")))
    checkpoint_before = checkpoint.checkpoints(config.run)
    with pytest.raises(InputError, match=r"can't be resumed with other data: .*other holds other tokens"):
        train(dataclasses.replace(config, data=tmp_path / "other"), resume=True, progress=False)
    assert checkpoint.checkpoints(config.run) == checkpoint_before
    moved = tmp_path / "moved"
    shutil.copytree(tiny_data, moved)
    train(dataclasses.replace(config, data=moved), resume=True, progress=False)


def test_two_processes_do_not_train_in_one_folder(make_config):
    config = make_config(num_steps=3)
    with run_folder.lock(config.run), pytest.raises(InputError, match="another process is training in"):
        train(config, progress=False)
    train(config, progress=False)
    with run_folder.lock(config.run), pytest.raises(InputError, match="another process is training in"):
        train(config, resume=True, progress=False)


def test_resume_of_no_run_makes_no_folder(make_config):
    config = make_config()
    with pytest.raises(InputError, match="is not the folder of a run"):
        train(config, resume=True, progress=False)
    assert not config.run.exists()


@pytest.mark.parametrize(("content", "message"), [(None, "FileNotFoundError"), ("[]", "TypeError"), ("{", "JSON")])
def test_a_damaged_description_of_the_run_is_refused(make_config, content, message):
    config = make_config(num_steps=3)
    train(config, progress=False)
    path = config.run / "run.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=f"run.json can't be read: .*{message}"):
        train(config, resume=True, progress=False)


def test_a_model_larger_than_the_memory_is_refused(make_config):
    config = make_config("peer", model={"vocab_size": 300})
    layer = dataclasses.replace(config.model.expert_layer, num_experts=(2**20) ** 2)
    huge = dataclasses.replace(config, model=dataclasses.replace(config.model, expert_layer=layer))
    with pytest.raises(InputError, match=r"does not fit into the memory of cpu: .*allocate"):
        train(huge, progress=False)
    assert not config.run.exists()


def test_a_finished_run_resumed_does_nothing(make_config, capsys):
    config = make_config(num_steps=3)
    train(config, progress=False)
    before = (config.run / "metrics.jsonl").read_text()
    train(config, resume=True, progress=False)
    assert (config.run / "metrics.jsonl").read_text() == before
    assert "is finished: it has made all its 3 steps" in capsys.readouterr().err


def test_a_run_cut_off_before_its_first_checkpoint_starts_again(make_config):
    config = make_config(num_steps=3)
    train(config, progress=False)
    reference = load_model(config.run).state_dict()
    shutil.rmtree(config.run / "checkpoints")
    train(config, resume=True, progress=False)
    assert all(torch.equal(reference[name], tensor) for name, tensor in load_model(config.run).state_dict().items())
    assert [row["step"] for row in lines(config.run, "train")] == [2, 3]


def test_bf16_is_chosen_where_it_is_faster(make_config):
    assert choose_precision("auto", choose_device("cpu")) == "fp32"
    assert choose_precision("bf16", choose_device("cpu")) == "bf16"
    config = make_config(precision="bf16", num_steps=40)
    train(config, progress=False)
    rows = lines(config.run, "train")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert {t.dtype for t in load_model(config.run).state_dict().values()} == {torch.float32, torch.int64}


def test_tensorboard_gets_the_same_numbers(make_config):
    config = make_config()
    train(config, progress=False)
    events = EventAccumulator(str(config.run / "tensorboard"))
    events.Reload()
    got = {event.step: event.value for event in events.Scalars("train/loss")}
    assert got == pytest.approx({row["step"]: row["loss"] for row in lines(config.run, "train")})
    assert checkpoint.checkpoints(config.run)


def test_every_function_takes_its_paths_as_strings(make_config, tiny_data, tmp_path):
    config = make_config(run=str(tmp_path / "run"), data=str(tiny_data))
    train(config, progress=False)
    run = str(config.run)
    assert run_folder.read_config(run) == make_config()
    expected, got = load_model(config.run), load_model(run)
    assert all(torch.equal(expected.state_dict()[name], each) for name, each in got.state_dict().items())
    found = checkpoint.checkpoints(run)
    assert found == checkpoint.checkpoints(config.run)
    checkpoint.load_checkpoint(str(found[-1]), got)
    saved = checkpoint.save_checkpoint(str(tmp_path / "copy"), 1, got, [], {}, keep=1)
    assert saved == tmp_path / "copy/checkpoints/step-00000001"
    report = str(tmp_path / "pages" / "report.html")
    write_report([run], report, command="x")
    assert "run" in (tmp_path / "pages/report.html").read_text()


@pytest.mark.parametrize("name", ["\udcff", "run\udce9"])
def test_a_run_whose_name_is_not_utf_8_is_refused(make_config, tmp_path, name):
    run = tmp_path / name
    train(make_config(num_steps=2), progress=False)
    (tmp_path / "run").rename(run)
    with pytest.raises(InputError, match=r"run must be a path in UTF-8, got b'.*\\xf?e?\w'"):
        load_model(run)
