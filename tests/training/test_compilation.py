"""Compiled blocks: chosen where they pay, the losses of the blocks as they are, and the run that was cut off."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tinyexperts.errors import InputError
from tinyexperts.training import compilation, loop, train
from tinyexperts.training.compilation import COMPILE_FROM_FLOPS, choose_compilation

# torch.compile looks at .grad, and hides the warning that it gets; here it would be an error before it is hidden.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # named only


def losses(run, split="train"):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == split]


def choose(choice, device=CPU, *, training_flops=COMPILE_FROM_FLOPS, is_alone=True):
    return choose_compilation(choice, device, training_flops=training_flops, is_alone=is_alone)[0]


@pytest.fixture
def compiler(monkeypatch):
    """The result of the compiler's check; None: it works."""
    result = []
    monkeypatch.setattr(compilation, "_failure_to_compile", lambda device: result[0] if result else None)
    return result


def test_auto_compiles_long_runs_of_one_process_on_cpus(compiler):
    assert choose("auto")
    assert not choose("auto", training_flops=0.99 * COMPILE_FROM_FLOPS)
    assert not choose("auto", GPU)
    assert not choose("auto", is_alone=False)
    assert choose("on", training_flops=1.0)
    assert choose("on", GPU)
    assert not choose("off")


def test_a_compiler_that_fails_is_reported(compiler):
    compiler.append("no working C++ compiler found")
    is_compiled, words = choose_compilation("auto", CPU, training_flops=COMPILE_FROM_FLOPS, is_alone=True)
    assert not is_compiled
    assert words == "blocks not compiled, since torch.compile fails (no working C++ compiler found)"
    with pytest.raises(InputError, match=r"compile must be auto or off where .* got on \(no working C\+\+ compiler"):
        choose("on")
    with pytest.raises(InputError, match="compile must be auto or off for a run of several processes, got on"):
        choose("on", is_alone=False)


def test_without_a_compiler_a_run_is_not_compiled(make_config, monkeypatch, capsys):
    monkeypatch.setattr(compilation, "COMPILE_FROM_FLOPS", 1.0)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        train(make_config("dense", num_steps=1))
    assert "blocks not compiled, since torch.compile fails (" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe", "pkm", "peer"])
def test_compiled_blocks_give_the_losses_of_the_blocks_as_they_are(make_config, tmp_path, kind):
    found = {}
    for choice in ("off", "on"):
        config = make_config(kind, run=tmp_path / choice, compile=choice, num_steps=20, log_every=1, validation_every=7)
        train(config, progress=False)
        found[choice] = losses(config.run) + losses(config.run, "validation")
    assert found["on"] == pytest.approx(found["off"], rel=2e-4)


@pytest.mark.slow
def test_a_compiled_run_that_was_cut_off_continues_bit_for_bit(make_config, tmp_path, monkeypatch):
    whole = make_config("peer", run=tmp_path / "whole", compile="on", num_steps=12, log_every=1)
    train(whole, progress=False)
    cut = dataclasses.replace(whole, run=tmp_path / "cut", checkpoint=dataclasses.replace(whole.checkpoint, every=5))
    make_step = loop.optimizer_step

    def stop_at_the_eighth(run, step):
        if step == 7:
            raise KeyboardInterrupt
        return make_step(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", stop_at_the_eighth)
        with pytest.raises(KeyboardInterrupt):
            train(cut, progress=False)
    torch._dynamo.reset()
    train(cut, resume=True, progress=False)
    assert losses(cut.run) == losses(whole.run)
