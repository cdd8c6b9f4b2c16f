"""Runs of version 1, of every kind of layer: their models are read, and training continues from their checkpoints.

version_1/ was written by the last code of version 1: a data set, a run of each kind cut back to step 12 of 16, and, in
expected.json, logits at step 12 and the losses of the steps after it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tinyexperts.training import load_model, train
from tinyexperts.training.config import with_settings
from tinyexperts.training.run_folder import read_config

FOLDER = Path(__file__).with_name("version_1")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
KINDS = ["dense", "expert_choice_moe", "product_key_memory", "peer"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_read(kind):
    logits = load_model(FOLDER / kind)(torch.tensor(EXPECTED["tokens"]))[0, :, 97:105]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED[kind]["logits"]), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_continues(kind, tmp_path):
    run = tmp_path / kind
    shutil.copytree(FOLDER / kind, run)
    config = with_settings(read_config(run), {"run": run, "data": FOLDER / "data"})
    train(config, resume=True, progress=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 17))
    losses = [row["loss"] for row in rows if row["split"] == "train" and row["step"] > 12]
    assert losses == pytest.approx(EXPECTED[kind]["losses"], rel=1e-5)
    assert rows[-1]["split"] == "validation"
    assert rows[-1]["loss"] == pytest.approx(EXPECTED[kind]["validation_loss"], rel=1e-5)
