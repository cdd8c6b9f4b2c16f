"""The examples run, and come to what they promise."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

import matplotlib as mpl
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


@pytest.fixture
def run_notebook(monkeypatch, tmp_path):
    """Run the cells of a notebook in order, with other values of its parameters; returns its names."""
    shown = []
    # Where a notebook's own backend shows a figure, it is drawn here, and closed.
    mpl.use("Agg", force=True)
    plt = importlib.import_module("matplotlib.pyplot")
    monkeypatch.setattr(plt, "show", lambda: (plt.gcf().canvas.draw(), shown.append(plt.gcf()), plt.close()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(name, **parameters):
        names = {"figures": shown}
        for number, cell in enumerate(cells_of(name)):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert parameters.keys() <= names.keys()
                names |= parameters
        return names

    return run


def cells_of(name):
    """The cells of a notebook."""
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]


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


def test_a_decoder_of_transformers_learns_in_its_trainer(tmp_path, capsys):
    losses = example("huggingface_trainer").main(tmp_path, steps=30)
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 1
    assert "def " in capsys.readouterr().out
    assert '"kind": "peer"' in (tmp_path / "config.json").read_text()


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


def check_look_into_experts(names):
    """What the notebook shows is there, and consistent."""
    reply, found = names["reply"], names["found"]
    assert reply.text
    assert 0 < reply.probability <= 1
    assert len(reply.experts) == 16
    assert {expert.layer for expert in reply.experts} == {names["layer"]} == {"blocks.1.feed_forward"}
    assert all(len(names["promoted"](expert)) == 5 for expert in reply.experts)
    assert names["share"].mean() == pytest.approx(1)
    # Most experts of a new wording are among those that the old ones use.
    assert (names["share"][[expert.id for expert in reply.experts]] > 0).mean() > 0.5
    assert 0.05 < names["usage"].usage < 1
    assert set(names["gone"]) <= set(names["known"]) <= set(names["capitals"])
    assert found.counts == (1, 4, 16)
    assert found.fired.own[-1].mean() > found.fired.own[0].mean()
    assert found.fired.own[-1].mean() > found.fired.others[-1].mean()
    assert len(names["figures"]) == 2


@pytest.mark.slow
def test_a_whole_look_into_experts(run_notebook, capsys):
    names = run_notebook("look_into_experts")
    assert "questions are answered right" in capsys.readouterr().out
    check_look_into_experts(names)
    assert names["recall"].all.recall > 0.7
    assert names["known"]
    assert names["gone"]
    assert names["found"].own_minus_others(16).outcome == "higher"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        *("huggingface_trainer.py", "layer_in_a_loop.py", "run_from_python.py", "study_from_python.py"),
        *("x_transformers_decoder.py", "look_into_experts.ipynb"),
    }
