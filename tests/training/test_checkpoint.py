"""Checkpoints: whole or not there, checked, and equal to what was saved."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from tinyexperts.errors import InputError
from tinyexperts.training import checkpoint as checkpoint_module
from tinyexperts.training import checkpoint_files, load_model, train
from tinyexperts.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint


@pytest.fixture
def trained(make_config):
    config = make_config(num_steps=3)
    train(config, progress=False)
    return config


def test_the_last_k_are_kept(make_config):
    config = make_config(num_steps=7, checkpoint={"every": 2, "keep": 2})
    train(config, progress=False)
    assert [path.name for path in checkpoints(config.run)] == ["step-00000006", "step-00000007"]


def test_what_deaths_have_left_is_cleared_away(trained):
    folder = trained.run / "checkpoints"
    for name in ("step-00000002.partial", "step-00000001.old.partial"):
        folder.joinpath(name).mkdir()
        folder.joinpath(name, "half").write_text("written")
    save_checkpoint(trained.run, 4, load_model(trained.run), [], {}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]


def test_a_checkpoint_half_deleted_is_not_taken_for_good(trained, monkeypatch):
    def delete_half(path):
        next(path.glob("*.safetensors")).unlink()
        raise OSError(errno.EIO, "a disk that fails")

    monkeypatch.setattr(shutil, "rmtree", delete_half)
    save_checkpoint(trained.run, 4, load_model(trained.run), [], {"step": 4}, keep=1)
    assert [path.name for path in checkpoints(trained.run)] == ["step-00000004"]
    assert load_checkpoint(checkpoints(trained.run)[-1], load_model(trained.run)) == {"step": 4}
    monkeypatch.undo()
    save_checkpoint(trained.run, 4, load_model(trained.run), [], {"step": 4}, keep=1)
    assert [path.name for path in (trained.run / "checkpoints").iterdir()] == ["step-00000004"]


def test_no_file_of_a_checkpoint_is_a_pickle(trained):
    names = {path.name for path in checkpoints(trained.run)[-1].iterdir()}
    assert names == {"manifest.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"}


def test_large_tensors_are_written_in_parts(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint_files, "FILE_BYTES", 1000)
    model = load_model(trained.run)
    save_checkpoint(tmp_path, 1, model, [], {}, keep=1)
    files = list((tmp_path / "checkpoints/step-00000001").glob("*.safetensors"))
    assert len(files) > 20
    assert max(file.stat().st_size for file in files if not file.name.startswith("model-")) < 2000
    other = load_model(trained.run)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_checkpoint(tmp_path / "checkpoints/step-00000001", other)
    for (name, got), expected in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "no manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_refused(trained, damage):
    folder = checkpoints(trained.run)[-1]
    path = next(folder.glob("*.safetensors"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "altered":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    elif damage == "empty manifest":
        (folder / "manifest.json").write_text("[]")
    else:
        (folder / "manifest.json").unlink()
    message = "not a whole checkpoint" if "manifest" in damage else "truncated or altered"
    if damage == "missing":
        message = "lacks its file"
    with pytest.raises(InputError, match=message):
        load_model(trained.run)


def test_weights_that_are_not_finite_are_refused(trained):
    model = load_model(trained.run)
    with torch.no_grad():
        model.blocks[1].feed_forward.experts[5, 0, 0] = float("nan")
    save_checkpoint(trained.run, 9, model, [], {}, keep=5)
    with pytest.raises(InputError, match=r"not finite: blocks\.1\.feed_forward\.experts"):
        load_model(trained.run)


def test_a_checkpoint_of_another_model_is_refused(trained, make_config):
    text = (trained.run / "config.json").read_text()
    (trained.run / "config.json").write_text(text.replace('"d_model": 16', '"d_model": 32'))
    with pytest.raises(InputError, match="does not fit the model"):
        load_model(trained.run)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(trained, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = load_model(trained.run)
    monkeypatch.setattr(checkpoint_module, "write_atomically", full)
    with pytest.raises(InputError, match=r"step 9 could not be written \(No space left on device\); .*step-00000003"):
        save_checkpoint(trained.run, 9, model, [], {}, keep=1)
    assert [path.name for path in (trained.run / "checkpoints").iterdir()] == ["step-00000003"]
    assert load_model(trained.run)


def test_checkpoints_written_during_training_are_those_of_the_step(make_config, tmp_path):
    whole = make_config()
    train(whole, progress=False)
    in_thread = make_config(run=tmp_path / "in_thread", checkpoint={"asynchronous": True})
    train(in_thread, progress=False)
    assert [path.name for path in checkpoints(in_thread.run)] == [path.name for path in checkpoints(whole.run)]
    for ours, theirs in zip(checkpoints(in_thread.run), checkpoints(whole.run), strict=True):
        found, expected = (load_file(path / "model-00001-of-00001.safetensors") for path in (ours, theirs))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        states = [json.loads((path / "manifest.json").read_text())["state"] for path in (ours, theirs)]
        assert [state["step"] for state in states] == [int(ours.name[-8:])] * 2


def test_what_is_written_during_training_is_a_copy(trained, monkeypatch):
    model = load_model(trained.run)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    may_write = threading.Event()
    write = checkpoint_module.write_tensors
    monkeypatch.setattr(checkpoint_module, "write_tensors", lambda *args: may_write.wait() and write(*args))
    writer = checkpoint_module.CheckpointWriter(trained.run, keep=5, ranks=checkpoint_module.ALONE, asynchronous=True)
    writer.save(9, model, [], {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert checkpoints(trained.run)[-1].name == "step-00000003"
    may_write.set()
    writer.wait()
    for name, tensor in load_model(trained.run).state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_full_disk_is_reported_when_a_write_during_training_is_waited_for(trained, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_atomically", full)
    writer = checkpoint_module.CheckpointWriter(trained.run, keep=5, ranks=checkpoint_module.ALONE, asynchronous=True)
    writer.save(9, load_model(trained.run), [], {})
    with pytest.raises(InputError, match="step 9 could not be written"):
        writer.wait()
    writer.wait()
    assert [path.name for path in (trained.run / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_write_that_really_fails_leaves_the_earlier_checkpoint_whole(trained):
    # A file-size limit is the nearest thing to a full disk that a test can have without being root.
    code = f"""
import resource, signal, sys
from pathlib import Path
from tinyexperts.errors import InputError
from tinyexperts.training import load_model
from tinyexperts.training.checkpoint import save_checkpoint
run = Path({str(trained.run)!r})
model = load_model(run)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {resource.RLIM_INFINITY}))
try:
    save_checkpoint(run, 9, model, [], {{}}, keep=1)
except InputError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large" in result.stdout
    assert "step-00000003" in result.stdout
    assert [path.name for path in (trained.run / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_run_without_a_checkpoint_and_a_folder_that_is_no_run(trained, tmp_path):
    with pytest.raises(InputError, match="is not the folder of a run"):
        load_model(tmp_path / "nowhere")
    for folder in checkpoints(trained.run):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    with pytest.raises(InputError, match="has no checkpoint yet"):
        load_model(trained.run)


def test_the_manifest_carries_the_state(trained):
    manifest = json.loads((checkpoints(trained.run)[-1] / "manifest.json").read_text())
    assert manifest["step"] == manifest["state"]["step"] == 3


def test_a_model_with_tied_embeddings_is_saved_and_loaded(make_config):
    config = make_config(num_steps=3, model={"tied_embeddings": True})
    train(config, progress=False)
    model = load_model(config.run)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.abs().sum() > 0


def test_weights_that_are_not_finite_push_out_no_good_checkpoint(make_config):
    config = make_config(
        num_steps=3,
        checkpoint={"every": 1, "keep": 1},
        optimizer={"matrix_learning_rate": 1e38},
        schedule={"warmup_fraction": 0},
    )
    with pytest.raises(InputError, match="not finite"):
        train(config, progress=False)
    assert checkpoints(config.run) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_that_is_not_finite_is_found(value, dtype):
    tensor = torch.randn(3, 5).to(dtype)
    assert checkpoint_module.is_finite(tensor)
    assert checkpoint_module.is_finite(torch.zeros(0))
    assert checkpoint_module.is_finite(torch.ones(2, dtype=torch.int64))
    tensor[1, 3] = value
    assert not checkpoint_module.is_finite(tensor)
