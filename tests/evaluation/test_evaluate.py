"""evaluate: both ways of routing an expert-choice model, and the usage of the others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tinyexperts.data import EncodedText, TokenDataset
from tinyexperts.errors import InputError
from tinyexperts.evaluation import evaluate, measure_perplexity
from tinyexperts.model import Transformer


def make(make_config, kind):
    torch.manual_seed(0)
    model = Transformer(make_config(kind).model).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def test_an_expert_choice_model_is_measured_in_both_ways_and_left_as_it_was(make_config, tiny_data):
    model = make(make_config, "moe")
    split = TokenDataset.open(tiny_data).split("validation")
    summary = evaluate(model, split).summary()
    layer = model.blocks[1].feed_forward
    assert layer.evaluation_routing == "threshold"
    assert summary["loss"] == measure_perplexity(model, split, context_length=16).loss
    layer.evaluation_routing = "expert_choice"
    assert summary["whole_sequences"]["loss"] == measure_perplexity(model, split, context_length=16).loss
    assert summary["loss"] != summary["whole_sequences"]["loss"]
    assert "threshold" in summary["routing"]
    assert "later tokens" in summary["whole_sequences"]["routing"]
    assert summary["expert_usage"] == []


@pytest.mark.parametrize(("kind", "last_call"), [("moe", 1), ("moe", 4), ("peer", 2), ("pkm", 1)])
def test_whatever_is_raised_the_model_is_left_as_it_was(make_config, tiny_data, monkeypatch, kind, last_call):
    model = make(make_config, kind).train()
    model.blocks[0].eval()
    state = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    calls, forward = [], Transformer.forward

    def failing(*arguments, **options):
        calls.append(model.blocks[1].feed_forward.__dict__.get("evaluation_routing"))
        if len(calls) == last_call:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    monkeypatch.setattr(Transformer, "forward", failing)
    with pytest.raises(KeyboardInterrupt):  # three batches each way of routing
        evaluate(model, TokenDataset.open(tiny_data).split("validation"), batch_size=1, max_tokens=3 * 16)
    assert {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()} == state
    if kind == "moe":
        assert calls == ["threshold"] * min(last_call, 3) + ["expert_choice"] * (last_call - 3)
        assert model.blocks[1].feed_forward.evaluation_routing == "threshold"


@pytest.mark.parametrize(("kind", "num_experts"), [("peer", 64), ("pkm", 64)])
def test_expert_usage_is_reported_by_layer(make_config, tiny_data, tmp_path, kind, num_experts):
    model = make(make_config, kind)
    result = evaluate(model, TokenDataset.open(tiny_data).split("validation"))
    summary = result.summary()
    assert "whole_sequences" not in summary
    assert summary["routing"] is None
    (usage,) = summary["expert_usage"]
    assert usage["layer"] == "blocks.1.feed_forward"
    assert usage["num_experts"] == num_experts
    assert usage["num_dead"] == round((1 - usage["usage"]) * num_experts)
    share = result.results["expert_usage"].by_layer[usage["layer"]].share
    assert share.sum().item() == pytest.approx(1)
    result.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(saved) == list(summary)
    assert saved == summary | {"expert_usage": [usage | {"file": "expert-usage-blocks.1.feed_forward.npy"}]}
    assert np.array_equal(np.load(tmp_path / saved["expert_usage"][0]["file"]), share.numpy())


def test_text_of_files_is_measured_as_a_prepared_split_would_be(make_config, tiny_data, tmp_path):
    dataset = TokenDataset.open(tiny_data)
    texts = ["the red cat", "a blue house under the tree"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    tokens = EncodedText([tmp_path], dataset.tokenizer)
    expected = [i for text in texts for i in [*dataset.tokenizer.encode(text), dataset.tokenizer.end_of_text_id]]
    assert tokens.tokens.tolist() == expected
    assert (tokens.num_tokens, tokens.num_documents, tokens.num_bytes) == (len(expected), 2, sum(map(len, texts)))
    result = evaluate(make(make_config, "dense"), tokens).results["perplexity"].perplexity
    assert result.num_tokens == len(expected)
    assert result.bits_per_byte is not None


def test_files_without_text_are_reported(tiny_data, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="no text to measure"):
        EncodedText([tmp_path], TokenDataset.open(tiny_data).tokenizer)
