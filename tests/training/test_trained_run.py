"""A trained run from Python: its evaluation and the text that it generates."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tinyexperts.data import TokenDataset, Tokenizer
from tinyexperts.errors import InputError
from tinyexperts.evaluation import measure_perplexity
from tinyexperts.model import generate
from tinyexperts.training import evaluate_run, generate_text, load_model, train


@pytest.fixture
def config(make_config):
    config = make_config(num_steps=3)
    train(config, progress=False)
    return config


def test_the_held_out_split_is_measured_and_kept(config):
    result = evaluate_run(str(config.run))
    summary = result.evaluation.summary()
    split = TokenDataset.open(config.data).split("validation")
    expected = measure_perplexity(load_model(config.run), split, context_length=16)
    assert (summary["loss"], summary["num_tokens"]) == (expected.loss, split.num_tokens)
    assert (result.text, result.remarks) == (f"{config.data} (validation)", ())
    saved = json.loads((config.run / "evaluation.json").read_text())
    assert saved["loss"] == expected.loss
    assert (config.run / saved["expert_usage"][0]["file"]).exists()


def test_other_text_is_measured_and_not_kept(config, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("the red cat under the tree")
    (text / "b.txt").write_text("")
    shutil.copytree(config.data, tmp_path / "copy")
    of_files = evaluate_run(config.run, files=[str(text)])
    assert of_files.text == str(text)
    assert any("documents without text" in remark for remark in of_files.remarks)
    tokens = Tokenizer.load(config.run / "tokenizer.json").encode("the red cat under the tree")
    assert of_files.evaluation.summary()["num_tokens"] == len(tokens) + 1
    for options in ({"data": tmp_path / "copy"}, {"split": "train"}, {"max_tokens": 32}):
        assert evaluate_run(config.run, **options).evaluation.summary()["loss"] > 0
    assert not (config.run / "evaluation.json").exists()


def test_text_is_generated_as_by_the_model(config):
    tokenizer = Tokenizer.load(config.run / "tokenizer.json")
    ids = tokenizer.encode("the cat")
    tokens = generate(load_model(config.run), torch.tensor([ids]), max_new_tokens=5, temperature=0)[0].tolist()
    expected = tokenizer.decode(tokens[len(ids) :])
    assert generate_text(config.run, "the cat", max_new_tokens=5, temperature=0) == expected
    texts = {generate_text(str(config.run), "the cat", seed=seed) for seed in (1, 1, 2)}
    assert len(texts) == 2


def test_bad_settings_are_refused(config):
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"split": "test"}, "splits train, validation, got 'test'"),
        ({"data": "a", "files": ["b"]}, "give either data or files, got a and 1 files"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_run(config.run, **options)
    with pytest.raises(InputError, match="seed must be between"):
        generate_text(config.run, "a", seed=-1)
    with pytest.raises(InputError, match="run must be a path, got 3"):
        generate_text(3, "a")
