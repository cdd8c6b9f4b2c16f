"""The examples run, and come to what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tinyexperts import PEER

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_layer_learns_in_a_plain_loop(capsys):
    right = example("layer_in_a_loop").main(steps=60)
    assert right > 0.9
    assert "step 40: loss" in capsys.readouterr().out


def test_a_run_from_python(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"The number {number} has {len(str(number))} digits. " * 40)
    written = example("run_from_python").main(tmp_path / "out", texts, num_steps=2, vocab_size=280)
    assert isinstance(written, str)
    assert "held-out tokens" in capsys.readouterr().out
    assert (tmp_path / "out/run/evaluation.json").is_file()


@pytest.mark.slow
def test_a_study_from_python(tmp_path, tiny_data):
    losses = example("study_from_python").main(tiny_data, tmp_path / "study")
    assert losses.shape == (2, 2)
    assert losses.notna().all().all()


DEPRECATED = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"  # x-transformers calls it at its import


@pytest.mark.filterwarnings(DEPRECATED)
def test_a_decoder_of_x_transformers_learns_facts(capsys):
    learned = example("x_transformers_decoder").main(steps=60)
    assert learned.loss_before > 3
    assert learned.loss_after < 0.6 * learned.loss_before
    assert learned.recall > 0.1
    assert "step 40: loss" in capsys.readouterr().out
    # One token at a time finds the experts that the whole text finds.
    assert torch.equal(learned.written, learned.written_without_cache)
    layers = [name for name, module in learned.model.named_modules() if isinstance(module, PEER)]
    assert layers == ["attn_layers.layers.3.1"]


@pytest.mark.slow
@pytest.mark.filterwarnings(DEPRECATED)
def test_a_decoder_of_x_transformers_knows_all_facts():
    learned = example("x_transformers_decoder").main()
    assert learned.recall > 0.95
    assert torch.equal(learned.written, learned.written_without_cache)


@pytest.mark.filterwarnings(DEPRECATED)
def test_the_layer_in_x_transformers_is_scaled_by_deep_embeddings():
    module = example("x_transformers_decoder")
    torch.manual_seed(0)
    decoder = module.Decoder(dim=16, depth=3, heads=2, attn_dim_head=8)
    layer = module.PEERFeedForward(16, num_experts=64, num_heads=2, experts_per_head=3, query_dim=6)
    module.replace_middle_feed_forward(decoder, layer)
    model = module.TransformerWrapper(num_tokens=9, max_seq_len=7, attn_layers=decoder, ff_deep_embed=True).eval()
    ids = torch.randint(9, (2, 7))
    plain = PEER(16, num_experts=64, num_heads=2, experts_per_head=3, query_dim=6).eval()
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        model.ff_deep_embed.normal_()
        given = []
        handle = layer.register_forward_hook(lambda _layer, x, y: given.append((x[0], y)))
        whole = model(ids)
        handle.remove()
        ((x, y),) = given
        torch.testing.assert_close(y, plain(x) * model.ff_deep_embed[ids][:, :, 1], rtol=1e-5, atol=1e-6)
        layer.experts[:, -1] = 0
        assert (whole - model(ids)).abs().max() > 1e-3


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        *("layer_in_a_loop.py", "run_from_python.py", "study_from_python.py"),
        *("x_transformers_decoder.py",),
    }
