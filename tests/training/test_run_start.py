"""How a run begins, wherever train() is called from, and what it leaves where it comes to nothing."""

from __future__ import annotations

import errno
import json
import signal
import sys
import threading

import pytest
import torch

from tinyexperts.errors import InputError
from tinyexperts.model import Transformer
from tinyexperts.training import Interrupted, config_file, load_model, loop, run_folder, train

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


def in_a_thread(work):
    """Call it in a thread, and raise here what it raises there."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def handlers():
    return {number: signal.getsignal(number) for number in SIGNALS}


def test_a_run_in_a_thread_is_the_run_in_the_main_thread(make_config, tmp_path):
    before = handlers()
    for name, call in (("main", lambda work: work()), ("thread", in_a_thread)):
        config = make_config(run=tmp_path / name)
        call(lambda config=config: train(config, progress=False))
        assert handlers() == before
    expected = load_model(tmp_path / "main").state_dict()
    assert all(torch.equal(expected[name], each) for name, each in load_model(tmp_path / "thread").state_dict().items())
    with pytest.raises(InputError, match="exists: add --resume"):
        in_a_thread(lambda: train(config, progress=False))


def stops_at(step, monkeypatch, number=signal.SIGTERM):
    """A training gets a signal in its step of this number, from 0."""
    optimizer_step = loop.optimizer_step

    def with_signal(run, at):
        if at == step:
            signal.raise_signal(number)
        return optimizer_step(run, at)

    monkeypatch.setattr(loop, "optimizer_step", with_signal)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_to_resume_from_python_is_python(make_config, monkeypatch, number):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/run/kernel-1.json"])
    config = make_config()
    stops_at(2, monkeypatch, number)
    before = handlers()
    with pytest.raises(Interrupted) as stop:
        train(config, progress=False)
    assert str(stop.value) == f"{number.name}: saved {config.run} at step 3; to go on: train(config, resume=True)"
    assert json.loads((config.run / "run.json").read_text())["command"] == "train(config), from Python"
    assert handlers() == before


@pytest.mark.parametrize(
    ("command", "again"),
    [
        (["train", "peer", "--run", "a b"], "tinyexperts train peer --run 'a b' --resume"),
        (["train", "peer", "--resume", "--seed", "1"], "tinyexperts train peer --seed 1 --resume"),
        (["study", "run", "runs/s", "peer-1"], "tinyexperts study run runs/s peer-1"),
    ],
)
def test_the_command_to_resume_from_the_command_line_is_a_command(make_config, monkeypatch, command, again):
    config = make_config()
    stops_at(0, monkeypatch)
    with pytest.raises(Interrupted, match=f"at step 1; to go on: {again}$"):
        train(config, progress=False, command=command)
    recorded = json.loads((config.run / "run.json").read_text())["command"].replace("'a b'", "a b")
    assert recorded.split() == ["tinyexperts", *" ".join(command).split()]


def test_a_signal_that_another_program_listens_to_is_left_to_it(make_config, monkeypatch):
    getsignal, taken, set_handler = signal.getsignal, [], signal.signal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else getsignal(number))
    monkeypatch.setattr(signal, "signal", lambda number, handler: taken.append(number) or set_handler(number, handler))
    train(make_config(num_steps=2), progress=False)
    assert set(taken) == {signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def broken(*arguments, **options):
    raise RuntimeError("out of memory")


def not_finite(model, tokens, targets):
    return model.head.weight.sum() * float("nan")


FAILURES = {
    "the configuration can't be written": (config_file, "to_content", broken, RuntimeError),
    "the description can't be made": (run_folder, "write_atomically", full, InputError),
    "no metrics": (run_folder.Metrics, "__init__", full, InputError),
    "no TensorBoard": (run_folder, "SummaryWriter", broken, RuntimeError),
    "no progress bar": (loop.TrainingBar, "__enter__", broken, RuntimeError),
    "no signal handlers": (signal, "signal", broken, RuntimeError),
    "the first step": (Transformer, "loss", broken, RuntimeError),
    "Ctrl-C": (Transformer, "loss", interrupted, KeyboardInterrupt),
    "no finite loss": (Transformer, "loss", not_finite, InputError),
}


@pytest.mark.parametrize(("owner", "name", "failing", "raised"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("exists", [False, True])
def test_what_fails_before_the_first_step_leaves_no_folder_in_the_way(
    make_config, monkeypatch, owner, name, failing, raised, exists
):
    config = make_config(num_steps=2)
    if exists:
        config.run.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(raised):
            train(config, progress=False)
    assert config.run.exists() == exists
    assert not exists or list(config.run.iterdir()) == []
    train(config, progress=False)
    assert load_model(config.run)


def test_what_another_has_put_there_meanwhile_stays(make_config, monkeypatch):
    config = make_config()

    def noted(*arguments):
        (config.run / "notes.txt").write_text("mine")
        raise RuntimeError

    monkeypatch.setattr(Transformer, "loss", noted)
    with pytest.raises(RuntimeError):
        train(config, progress=False)
    assert [path.name for path in config.run.iterdir()] == ["notes.txt"]


def test_what_fails_later_or_when_it_is_resumed_keeps_its_folder(make_config, monkeypatch):
    config, loss, calls = make_config(checkpoint={"every": 100}), Transformer.loss, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) in (3, 4):
            raise RuntimeError("out of memory")
        return loss(*arguments)

    monkeypatch.setattr(Transformer, "loss", failing)
    for resume in (False, True):  # in the third step, and in the first of the run that begins again
        with pytest.raises(RuntimeError, match="out of memory"):
            train(config, resume=resume, progress=False)
        assert run_folder.is_run(config.run)
    train(config, resume=True, progress=False)
    assert load_model(config.run)


def test_a_run_that_another_process_has_made_meanwhile_is_left_alone(make_config, monkeypatch):
    config, held = make_config(num_steps=2), run_folder.lock

    def held_late(folder):
        monkeypatch.setattr(run_folder, "lock", held)
        train(config, progress=False)
        return held(folder)

    monkeypatch.setattr(run_folder, "lock", held_late)
    with pytest.raises(InputError, match="exists: add --resume"):
        train(config, progress=False)
    assert run_folder.is_run(config.run)
    assert load_model(config.run)
