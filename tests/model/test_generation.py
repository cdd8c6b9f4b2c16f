"""Generation: with the cache it equals the full forward pass, token by token; its draws follow the settings."""

from __future__ import annotations

import pytest
import torch

from tinyexperts.errors import InputError
from tinyexperts.layers import DenseConfig, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import Cache, Transformer, TransformerConfig, generate
from tinyexperts.model.generation import _draw

LAYERS = [
    DenseConfig(),
    ExpertChoiceMoEConfig(num_experts=4, hidden_dim=12),
    ProductKeyMemoryConfig(num_experts=49, num_heads=2, experts_per_head=3, query_dim=6),
    PEERConfig(num_experts=49, num_heads=2, experts_per_head=3, query_dim=6),
]


def make(layer=LAYERS[3], **options):
    torch.manual_seed(0)
    defaults = {"vocab_size": 40, "context_length": 12, "d_model": 16, "num_layers": 3, "num_heads": 4}
    model = Transformer(TransformerConfig(expert_layer=layer, **(defaults | options))).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def prompt(batch=2, length=4):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("key_value_heads", [None, 2])
@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 1, 5], [12]])
def test_logits_with_the_cache_equal_the_full_forward(layer, key_value_heads, parts):
    model, sequence = make(layer, num_key_value_heads=key_value_heads), prompt(2, 12)
    cache, logits = Cache(model, 2), []
    for part in sequence.split(parts, dim=1):
        logits.append(model(part, cache))
    torch.testing.assert_close(torch.cat(logits, 1), model(sequence), rtol=1e-4, atol=1e-5)
    assert cache.length == 12


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_greedy_generation_is_the_argmax_of_the_full_forward(layer):
    model, sequence = make(layer), prompt()
    got = generate(model, sequence, max_new_tokens=8, temperature=0)
    for _ in range(8):
        sequence = torch.cat([sequence, model(sequence)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, sequence)


def test_draws_follow_the_generator_and_the_mode_is_restored():
    model = make().train()
    samples = [
        generate(model, prompt(), max_new_tokens=8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert model.training


def test_draws_keep_to_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = _draw(logits, 1.0, None, None, generator).flatten()
    share = torch.bincount(drawn, minlength=4) / 2000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.04, rtol=0)
    assert set(_draw(logits, 1.0, 2, None, generator).flatten().tolist()) == {0, 1}
    # 0.5 + 0.3 reach 0.7 and 0.8, not 0.81: the fewest tokens that reach the sum
    assert set(_draw(logits, 1.0, None, 0.7, generator).flatten().tolist()) == {0, 1}
    assert set(_draw(logits, 1.0, None, 0.81, generator).flatten().tolist()) == {0, 1, 2}
    assert set(_draw(logits, 1.0, None, 0.1, generator).flatten().tolist()) == {0}
    cold = torch.bincount(_draw(logits, 0.5, None, None, generator).flatten(), minlength=4) / 2000
    torch.testing.assert_close(cold, logits[0].div(0.5).softmax(-1), atol=0.04, rtol=0)


def shares(logits, temperature=1.0, top_k=None, top_p=None):
    """How often each token of one row of logits is drawn."""
    rows = torch.tensor([logits]).expand(2000, -1)
    drawn = _draw(rows, temperature, top_k, top_p, torch.Generator().manual_seed(0)).flatten()
    return (torch.bincount(drawn, minlength=len(logits)) / 2000).tolist()


TINY = [1e-30, 1e-38, 1e-40, 1e-42, 1e-45, 1e-46, 1e-100, 5e-324]
INF = float("inf")


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.99}, {"top_k": 3, "top_p": 1e-46}])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature, options):
    assert shares([1.0, 3.0, 2.999999, -5.0], temperature, **options) == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", TINY)
def test_a_tiny_temperature_draws_among_equals_as_any_other_does(temperature):
    assert shares([2.0, 1.0, 2.0, 2.0], temperature) == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.04)
    assert shares([2.0, 1.0, 2.0, 2.0], 0.0) == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e30, 1e38, 3.5e38, 1e100, 1.7e308])
def test_a_huge_temperature_draws_evenly_and_keeps_the_order(temperature):
    logits = [0.0, 3.0, 1.0, 2.0]
    assert shares(logits, temperature) == pytest.approx([0.25] * 4, abs=0.04)
    assert shares(logits, temperature, top_k=2) == pytest.approx([0, 0.5, 0, 0.5], abs=0.04)
    assert shares(logits, temperature, top_p=0.7) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.04)
    assert shares([-INF, 3.0, 1.0, -INF], temperature) == pytest.approx([0, 0.5, 0.5, 0], abs=0.04)


@pytest.mark.parametrize("top_p", TINY)
def test_a_tiny_top_p_takes_the_likeliest_token(top_p):
    assert shares([0.5, 0.4, 0.6], top_p=top_p) == [0, 0, 1]
    assert shares([0.5, 0.5, 0.5], top_p=top_p) == [1, 0, 0]


def test_the_whole_probability_leaves_out_no_token(monkeypatch):
    logits = 2 * torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))  # whose sum in fp32 passes 1 early
    drawn = []
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, *_, **__: drawn.append(probabilities))
    for top_p in (None, 1.0):
        _draw(logits, 1.0, None, top_p, None)
    assert torch.equal(*drawn)
    assert (drawn[1] > 0).all()


def test_top_k_keeps_as_many_of_equals_and_more_than_there_are_keeps_all():
    assert shares([1.0, 1.0, 1.0, 1.0], top_k=1) == [1, 0, 0, 0]
    assert shares([0.0, 1.0, 1.0, 1.0], top_k=2) == pytest.approx([0, 0.5, 0.5, 0], abs=0.04)
    assert shares([0.0, 0.0], top_k=5) == pytest.approx([0.5, 0.5], abs=0.04)


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1.0, 1e100])
def test_infinite_logits_are_certain_or_never_drawn(temperature):
    assert shares([-INF, 1.0, INF, 2.0], temperature) == [0, 0, 1, 0]
    assert shares([-INF, 1.0, -INF], temperature, top_k=2) == [0, 1, 0]
    assert shares([INF, 1.0, INF], temperature or 1.0, top_p=1.0) == pytest.approx([0.5, 0, 0.5], abs=0.04)
    for bad in ([float("nan"), 1.0], [-INF, -INF]):
        with pytest.raises(InputError, match=f"logits must be numbers, got {bad[0]} for the likeliest token"):
            shares(bad, temperature)


def test_generation_ends_with_the_text():
    model = make()
    first = int(generate(model, prompt(1), max_new_tokens=1, temperature=0)[0, -1])
    assert generate(model, prompt(1), max_new_tokens=8, temperature=0, end_of_text_id=first).shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 9}, "4 tokens and 9 new ones are more than the model's context of 12"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0 and finite, got inf"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "at most 1, got 1.5"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises(InputError, match=message):
        generate(make(), prompt(), **({"max_new_tokens": 4} | options))
    with pytest.raises(InputError, match=r"at least one token, got \[2, 0\]"):
        generate(make(), prompt(2, 0), max_new_tokens=4)


def test_generated_tokens_can_be_trained_on():
    model = make()
    tokens = generate(model, prompt(), max_new_tokens=4, temperature=0)
    model(tokens).sum().backward()
    assert model.embedding.weight.grad is not None


@pytest.mark.parametrize("is_sharded", [False, True])
def test_what_fsdp2_gathers_is_no_tensor_of_inference_mode(is_sharded):
    model, modes = make(), []
    model.register_forward_pre_hook(
        lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    if is_sharded:
        model.unshard = lambda: None  # as fully_shard gives a module
    generate(model, prompt(), max_new_tokens=2)
    assert modes == [(not is_sharded, False)] * 2


def test_each_module_gets_its_mode_back_after_a_failure_too():
    model = make().train()
    model.blocks[1].feed_forward.router.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(IndexError):
        generate(model, torch.full((1, 2), 40), max_new_tokens=4)
    assert {name: module.training for name, module in model.named_modules()} == before
    generate(model, prompt(), max_new_tokens=1)
    assert {name: module.training for name, module in model.named_modules()} == before
