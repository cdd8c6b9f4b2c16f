"""The transformer: its parts against formulas written out, causality, its account of costs, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinyexperts.errors import InputError
from tinyexperts.layers import PEER, DenseConfig, DenseFFN, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import Transformer, TransformerConfig, transformer
from tinyexperts.model.attention import Attention, rotary_angles, rotate

LAYERS = {
    "dense": DenseConfig(activation="relu2"),
    "moe": ExpertChoiceMoEConfig(num_experts=4, hidden_dim=12),
    "pkm": ProductKeyMemoryConfig(num_experts=49, num_heads=2, experts_per_head=3, query_dim=6),
    "peer": PEERConfig(num_experts=49, num_heads=2, experts_per_head=3, query_dim=6),
}


def make_config(kind="peer", **options):
    defaults = {"vocab_size": 40, "context_length": 12, "d_model": 16, "num_layers": 3, "num_heads": 4}
    return TransformerConfig(**(defaults | {"expert_layer": LAYERS[kind]} | options))


def make(kind="peer", **options):
    torch.manual_seed(0)
    model = Transformer(make_config(kind, **options)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)  # it starts at zero
    return model


def tokens(batch=2, length=9, seed=1):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key_value_heads", [None, 2, 1])
def test_attention_equals_the_formula(key_value_heads):
    config = make_config(num_key_value_heads=key_value_heads)
    torch.manual_seed(0)
    layer = Attention(config)
    x = torch.randn(2, 5, 16)
    got = layer(x, rotary_angles(config, torch.arange(5)))
    heads, width = 4, 4
    query, key, value = (p(x).view(2, 5, -1, width).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    repeats = heads // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)

    def turned(vectors):
        # As complex numbers: element i and i + half are the real and imaginary part.
        pairs = torch.complex(vectors[..., : width // 2], vectors[..., width // 2 :])
        position = torch.arange(5).view(-1, 1)
        frequency = 10000.0 ** (-2 * torch.arange(width // 2) / width)
        pairs = pairs * torch.polar(torch.ones(5, width // 2), position * frequency)
        return torch.cat([pairs.real, pairs.imag], -1)

    scores = turned(query) @ turned(key).transpose(-1, -2) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    expected = layer.output((scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(got, expected)


def test_rotation_keeps_lengths_and_depends_on_distances_alone():
    config = make_config()
    x, y = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    products = []
    for shift in (0, 5):
        first, second = (rotary_angles(config, torch.tensor([shift + place])) for place in (1, 3))
        products.append((rotate(x, first) * rotate(y, second)).sum())
        torch.testing.assert_close(rotate(x, first).norm(), x.norm())
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_later_token_changes_no_earlier_logit(kind):
    model, sequence = make(kind), tokens()
    changed = sequence.clone()
    changed[:, 5:] = tokens(seed=2)[:, 5:]
    before, after = model(sequence), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_the_middle_block_carries_the_expert_layer_by_default():
    kinds = [type(block.feed_forward) for block in make().blocks]
    assert kinds == [DenseFFN, PEER, DenseFFN]
    kinds = [type(block.feed_forward) for block in make(expert_blocks=(0, 2)).blocks]
    assert kinds == [PEER, DenseFFN, PEER]
    assert make_config(num_layers=12).blocks_with_experts == (6,)
    assert [type(block.feed_forward) for block in make(expert_blocks=()).blocks] == [DenseFFN] * 3


@pytest.mark.parametrize("tied", [True, False])
def test_the_block_order_and_the_head(tied):
    model = make("dense", tied_embeddings=tied)
    assert (model.head.weight is model.embedding.weight) == tied
    sequence = tokens()
    angles = rotary_angles(model.config, torch.arange(9))
    x = model.embedding.weight[sequence]
    for block in model.blocks:
        x = x + block.attention(F.rms_norm(x, (16,), block.attention_norm.weight, 1e-5), angles)
        x = x + block.feed_forward(F.rms_norm(x, (16,), block.feed_forward_norm.weight, 1e-5))
    expected = F.rms_norm(x, (16,), model.norm.weight, 1e-5) @ model.head.weight.T
    torch.testing.assert_close(model(sequence), expected)


@pytest.mark.parametrize("key_value_heads", [None, 2])
def test_flops_are_the_matmuls_of_a_forward_pass(key_value_heads):
    model, sequence = make("dense", num_key_value_heads=key_value_heads), tokens(2, 12)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(sequence)
    assert counter.get_total_flops() == 2 * 12 * model.flops_per_token(12)
    peer = make("peer", num_key_value_heads=key_value_heads)
    layer, dense = peer.blocks[1].feed_forward.flops_per_token(), model.blocks[1].feed_forward.flops_per_token()
    assert peer.flops_per_token(12) == model.flops_per_token(12) - dense.total + layer.total
    assert peer.router_flops_per_token() == layer.router > 0


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted(tied):
    model = make("peer", tied_embeddings=tied)
    count = model.num_parameters()
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    idle_experts = (49 - 6) * 2 * 16
    assert count.active == count.total - idle_experts - (0 if tied else 39 * 16)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_the_loss_in_chunks_is_the_cross_entropy_of_the_logits(monkeypatch, tied, chunk_tokens):
    monkeypatch.setattr(transformer, "_CHUNK_LOGITS", 40 * chunk_tokens)
    monkeypatch.setattr(transformer, "_LEAST_CHUNK_TOKENS", 1)
    model, inputs, targets = make(tied_embeddings=tied), tokens(seed=1), tokens(seed=2)
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected / 3, list(model.parameters()))
    loss = model.loss(inputs, targets)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    torch.testing.assert_close(loss, expected)
    (loss / 3).backward()  # as with gradient accumulation
    for parameter, gradient in zip(model.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_the_loss_elsewhere_is_that_of_the_logits(monkeypatch):
    monkeypatch.setattr(F, "linear_cross_entropy", None)  # not called
    model, inputs, targets = make(), tokens(seed=1), tokens(seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logits = model.loss(inputs, targets), model(inputs).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert model.double().loss(inputs, targets).dtype == torch.float32


def test_the_loss_where_torch_has_no_loss_in_chunks(monkeypatch):
    model, inputs, targets = make(), tokens(seed=1), tokens(seed=2)
    expected = model.loss(inputs, targets)
    monkeypatch.delattr(F, "linear_cross_entropy")
    torch.testing.assert_close(model.loss(inputs, targets), expected)


def test_the_first_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    logits = Transformer(make_config()).eval()(tokens())
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), tokens().flatten()), torch.tensor(math.log(40)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 20}, "multiple of 2 \\* num_heads = 8 .*, got 20"),
        ({"num_key_value_heads": 3}, "must divide num_heads = 4, got 3"),
        ({"expert_blocks": (3,)}, r"between 0 and 2, got \[3\]"),
        ({"expert_blocks": (1, 1)}, r"distinct blocks .*, got \[1, 1\]"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"expert_layer": PEERConfig(num_experts=1000)}, "got 1000; the nearest squares are 961 and 1024"),
        ({"rope_theta": 0.0}, "got 0.0 and 1e-05"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises(InputError, match=message):
        make_config(**options)


def test_a_sequence_longer_than_the_context_raises():
    with pytest.raises(InputError, match="13 tokens are more than the model's context of 12 tokens"):
        make()(tokens(1, 13))


def test_initial_weights_are_as_documented():
    torch.manual_seed(0)
    model = Transformer(make_config("dense", d_model=128, vocab_size=500))
    attention = model.blocks[0].attention
    for projection in (attention.query, attention.key, attention.value):
        assert projection.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert attention.output.weight.std().item() == pytest.approx((128 * 2 * 3) ** -0.5, rel=0.03)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not model.head.weight.any()
