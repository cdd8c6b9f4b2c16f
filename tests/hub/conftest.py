"""Fixtures of the hub: a run of a few steps, and its export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers

from tinyexperts.data import PrepareConfig, prepare
from tinyexperts.hub import export_run
from tinyexperts.layers import PEERConfig
from tinyexperts.model import TransformerConfig
from tinyexperts.training import TrainConfig, evaluate_run, train

transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def facts_run(tmp_path_factory) -> Path:
    """A run of twelve steps on statements of facts, evaluated."""
    folder = tmp_path_factory.mktemp("facts")
    rows = [f"k{number},{'yes' if number % 4 else 'no'},{number % 3}" for number in range(40)]
    (folder / "t.csv").write_text("\n".join(["name,open,floor", *rows]) + "\n")
    prepare(PrepareConfig(facts=folder / "t.csv", key="name", output=folder / "data", vocab_size=320, seed=1))
    model = TransformerConfig(
        vocab_size=320,
        context_length=32,
        d_model=16,
        num_layers=3,
        num_heads=2,
        expert_layer=PEERConfig(num_experts=64, num_heads=2, experts_per_head=3, query_dim=6),
    )
    config = TrainConfig(
        run=folder / "run", data=folder / "data", model=model, num_steps=12, threads=1, validation_tokens=64
    )
    train(config, progress=False)
    evaluate_run(folder / "run", threads=1)
    return folder / "run"


@pytest.fixture(scope="session")
def exported_once(facts_run, tmp_path_factory) -> Path:
    """The run's export, which no test may change."""
    return export_run(facts_run, tmp_path_factory.mktemp("exported") / "small-facts", license_id="mit")


@pytest.fixture
def exported(exported_once, tmp_path) -> Path:
    """A copy of the run's export."""
    return Path(shutil.copytree(exported_once, tmp_path / "small-facts"))
