"""500 steps on facts with tables in bf16: the loss is that of fp32, and rounded to nearest it is not."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tinyexperts.data import PrepareConfig, TokenDataset, prepare
from tinyexperts.evaluation import evaluate
from tinyexperts.layers import PEERConfig
from tinyexperts.optim import row_sparse_adam
from tinyexperts.training import load_model, train
from tinyexperts.training.config import with_settings
from tinyexperts.training.run import make_run
from tinyexperts.training.step import optimizer_step

NUM_STEPS = 500


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A data set of facts about 150 entities."""
    folder, draw = tmp_path_factory.mktemp("facts"), random.Random(0)
    rows = [
        f"k{number},{draw.randrange(100)},{draw.choice(('red', 'green', 'blue', 'black'))},{draw.choice('nesw')}"
        for number in range(150)
    ]
    (folder / "t.csv").write_text("\n".join(["name,floor,color,side", *rows]) + "\n")
    prepare(PrepareConfig(facts=folder / "t.csv", key="name", output=folder / "data", vocab_size=320))
    return folder / "data"


@pytest.fixture
def config(make_config, facts):
    model = {
        "vocab_size": 320,
        "context_length": 64,
        "d_model": 32,
        "expert_layer": PEERConfig(num_experts=1024, num_heads=2, experts_per_head=8, query_dim=16),
    }
    return make_config(model=model, data=facts, batch_size=8, num_steps=NUM_STEPS, checkpoint={"every": NUM_STEPS})


def held_out_loss(model, facts):
    return evaluate(model, TokenDataset.open(facts).split("validation")).summary()["loss"]


@pytest.mark.slow
def test_a_whole_run_ends_at_the_loss_of_fp32(config, facts, tmp_path):
    loss = {}
    for dtype in ("fp32", "bf16"):
        own = with_settings(config, {"run": tmp_path / dtype, "optimizer.table_dtype": dtype})
        train(own, progress=False)
        loss[dtype] = held_out_loss(load_model(own.run), facts)
    # Seeds of fp32 differ by 0.008: 0.8075, 0.8098 and 0.8157 where this was written.
    assert loss["bf16"] == pytest.approx(loss["fp32"], abs=0.02)


@pytest.mark.slow
def test_small_steps_of_the_table_alone_are_kept_by_stochastic_rounding_and_lost_to_nearest(
    config, facts, tmp_path, monkeypatch
):
    base = replace(config, run=tmp_path / "base", num_steps=100)
    train(base, progress=False)
    start = load_model(base.run)
    rates = dict.fromkeys(("matrix", "embedding", "head"), 0.0) | {"table": 1e-4}
    settings = {f"optimizer.{name}_learning_rate": rate for name, rate in rates.items()}

    def learned(dtype):
        """Return by how much the held-out loss falls while the table alone is trained."""
        run = make_run(with_settings(config, {**settings, "optimizer.table_dtype": dtype}))
        run.model.load_state_dict(start.state_dict())
        before = held_out_loss(run.model, facts)
        for step in range(NUM_STEPS):
            optimizer_step(run, step)
        return before - held_out_loss(run.model, facts)

    wide, narrow = learned("fp32"), learned("bf16")
    monkeypatch.setattr(row_sparse_adam, "seed_of_step", lambda *_: None)
    nearest = learned("bf16")
    # Where this was written: 0.00778, 0.00776 and 0.00090 nats a token.
    assert wide > 0.004
    assert narrow == pytest.approx(wide, rel=0.1)
    assert nearest < 0.4 * wide
