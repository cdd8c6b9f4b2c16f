"""measure_perplexity: every token once, the numbers by hand, the split by what copying could have found."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tinyexperts.data import TokenDataset, evaluation_windows
from tinyexperts.evaluation import bigram_stood_earlier, measure_perplexity
from tinyexperts.model import Transformer


@pytest.fixture
def model(make_config):
    torch.manual_seed(0)
    model = Transformer(make_config("peer").model)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


@pytest.fixture
def split(tiny_data):
    return TokenDataset.open(tiny_data).split("validation")


@pytest.mark.parametrize(("context_length", "batch_size"), [(16, 3), (5, 8), (1, 64)])
def test_equals_a_loop_over_windows(model, split, context_length, batch_size):
    result = measure_perplexity(model, split, context_length=context_length, batch_size=batch_size)
    model.eval()
    stream = [split.end_of_text_id, *split.tokens[0 : split.num_tokens].tolist()]
    total = 0.0
    for start in range(0, split.num_tokens, context_length):
        window = torch.tensor(stream[start : start + context_length + 1])
        with torch.no_grad():
            total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert result.num_tokens == split.num_tokens
    assert result.loss == pytest.approx(total / split.num_tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / split.num_bytes, rel=1e-5)


def test_a_limit_of_tokens_leaves_bits_per_byte_unknown_and_the_mode_as_it_was(model, split):
    model.train()
    result = measure_perplexity(model, split, context_length=16, max_tokens=33)
    assert result.num_tokens == 48  # three whole windows
    assert result.bits_per_byte is None
    assert model.training
    windows = list(evaluation_windows(split, 16))
    chosen = [windows[0], windows[len(windows) // 3], windows[2 * len(windows) // 3]]
    with torch.no_grad():
        logits = model.eval()(torch.stack([inputs for inputs, _ in chosen]))
    targets = torch.stack([targets for _, targets in chosen])
    assert result.loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-5)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("training", [False, True])
def test_whatever_is_raised_each_module_is_left_in_its_own_mode(model, split, monkeypatch, raised, training):
    model.train(training)
    model.blocks[1].feed_forward.router.norm.train(not training)  # frozen, or the one that is still adapted
    before = {name: module.training for name, module in model.named_modules()}

    def interrupted(*arguments, **options):
        assert not any(module.training for module in model.modules())
        raise raised

    measure_perplexity(model, split, context_length=16, max_tokens=16)
    assert {name: module.training for name, module in model.named_modules()} == before
    monkeypatch.setattr(F, "cross_entropy", interrupted)
    with pytest.raises(raised):
        measure_perplexity(model, split, context_length=16)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_bigrams_that_stood_earlier():
    inputs = torch.tensor([[1, 2, 1, 2, 3, 1], [5, 5, 5, 4, 5, 5]])
    targets = torch.tensor([[2, 1, 2, 3, 1, 2], [5, 5, 4, 5, 5, 5]])
    expected = [[False, False, True, False, False, True], [False, True, False, False, True, True]]
    assert bigram_stood_earlier(inputs, targets).tolist() == expected


def test_the_split_loss_adds_up_to_the_whole(model, split):
    result = measure_perplexity(model, split, context_length=16)
    parts = result.loss_by_copy
    whole = parts.new * (1 - parts.share_stood_earlier) + parts.stood_earlier * parts.share_stood_earlier
    assert whole == pytest.approx(result.loss)
    assert 0 < parts.share_stood_earlier < 1
