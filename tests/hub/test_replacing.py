"""Layers in the blocks of other people's decoders: values, generation, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_decoders import FAMILIES, NUM_BLOCKS, VOCAB_SIZE, WIDTH, tiny_decoder
from torch import nn

from tinyexperts import PEER, DenseFFN, ExpertChoiceMoE, ProductKeyMemory
from tinyexperts.errors import InputError
from tinyexperts.hub import replace_feed_forward
from tinyexperts.hub.replacing import decoder_blocks

IDS = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def peer(width: int, **options) -> PEER:
    torch.manual_seed(1)
    return PEER(width, 64, **{"num_heads": 2, "experts_per_head": 3, "query_dim": 6, **options})


def shared_by_ranks(layer: PEER) -> PEER:
    layer.ranks = object()
    return layer


# How a family's block comes from its input x, its attention's output a and the new layer.
def _after_one_norm(norm):
    return lambda block, x, a, layer: x + a + layer(getattr(block, norm)(x + a))


FORMULAS = {
    **dict.fromkeys(
        ("llama", "qwen3", "mistral", "mixtral", "phi3", "gpt_oss"), _after_one_norm("post_attention_layernorm")
    ),
    "gpt2": _after_one_norm("ln_2"),
    "gemma2": lambda block, x, a, layer: (
        (h := x + block.post_attention_layernorm(a))
        + block.post_feedforward_layernorm(layer(block.pre_feedforward_layernorm(h)))
    ),
    "olmo2": lambda block, x, a, layer: (
        (h := x + block.post_attention_layernorm(a)) + block.post_feedforward_layernorm(layer(h))
    ),
    "gpt_neox": lambda block, x, a, layer: x + a + layer(block.post_attention_layernorm(x)),  # side by side
}


def reference(family: str, number: int, layer: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of the dense model whose block is computed by the family's formula with a layer."""
    model = tiny_decoder(family)
    block = decoder_blocks(model)[number]
    (attention,) = [part for name, part in block.named_children() if name in ("self_attn", "attn", "attention")]
    seen = {}
    attention.register_forward_hook(lambda *called: seen.update(a=called[-1][0]))
    block.register_forward_hook(lambda block, args, output: FORMULAS[family](block, args[0], seen["a"], layer))
    logits = model(IDS).logits
    logits.square().mean().backward()
    inside = dict(layer.named_parameters(prefix="layer"))
    outside = {name: p for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {name: p.grad for name, p in {**outside, **inside}.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_is_the_familys_own_around_the_new_layer(family):
    layer = peer(WIDTH)
    expected, gradients = reference(family, 1, copy.deepcopy(layer))
    model = tiny_decoder(family)
    assert replace_feed_forward(model, [1], lambda width: layer) is model
    logits = model(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    logits.square().mean().backward()
    place = next(name for name, part in model.named_modules() if part is layer)
    got = {name.replace(place, "layer"): p.grad for name, p in model.named_parameters()}
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert (layer.experts.grad.abs().sum((1, 2)) > 0).sum() > 5
    with torch.no_grad():
        layer.experts.mul_(2)
    assert not torch.allclose(model(IDS).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_that_without(family):
    model = replace_feed_forward(tiny_decoder(family).eval(), [0, 2], peer)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    cached, uncached = (model.generate(IDS, attention_mask=mask, use_cache=cache, **GREEDY) for cache in (True, False))
    assert torch.equal(cached, uncached)
    assert cached.shape == (2, 13)


def test_generation_with_other_caches_and_beams():
    model = replace_feed_forward(tiny_decoder("llama").eval(), [1], peer)
    expected = model.generate(IDS, **GREEDY)
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(static, expected)
    beams = [model.generate(IDS, num_beams=3, use_cache=cache, **GREEDY) for cache in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize(
    "make",
    [
        lambda width: ProductKeyMemory(width, 64, num_heads=2, experts_per_head=3, query_dim=6),
        lambda width: ExpertChoiceMoE(width, 4, hidden_dim=8),
        lambda width: DenseFFN(width, 40, activation="silu"),
        lambda width: nn.Linear(width, width),
    ],
)
def test_any_layer_can_take_the_place(make):
    torch.manual_seed(1)
    layer = make(WIDTH)
    expected, _ = reference("llama", 2, copy.deepcopy(layer))
    model = replace_feed_forward(tiny_decoder("llama"), [2], lambda width: layer)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_mode_and_gradients_wanted_stay(dtype):
    model = tiny_decoder("qwen3").to(dtype).eval().requires_grad_(False)
    replace_feed_forward(model, [1], peer)
    layer = model.model.layers[1].mlp
    assert not any(part.training for part in model.modules())
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.router.norm.running_var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [p.requires_grad for p in layer.parameters()] == [True] * len(list(layer.parameters()))
    assert model(IDS).logits.dtype == dtype
    before = copy.deepcopy(model.state_dict())
    model.init_weights()  # of transformers, which draws what it doesn't know to be drawn
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    training = replace_feed_forward(tiny_decoder("qwen3"), [1], lambda width: peer(width).eval())
    assert all(part.training for part in training.model.layers[1].mlp.modules())


def test_replacing_moves_nothing_in_the_new_layer():
    layer = peer(WIDTH)
    before = copy.deepcopy(layer.state_dict())
    model = replace_feed_forward(tiny_decoder("llama"), [1], lambda width: layer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert model.model.layers[1].mlp is layer


def test_what_else_is_done_to_a_model_works():
    model = replace_feed_forward(tiny_decoder("llama").eval(), [1], peer)
    logits = model(IDS).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(IDS).logits, logits)
    model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False)
    torch.testing.assert_close(model(IDS).logits[..., :VOCAB_SIZE], logits)
    tied = replace_feed_forward(tiny_decoder("llama", tie_word_embeddings=True), [1], peer)
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    classifier = tiny_decoder("llama").model
    replace_feed_forward(classifier, [1], peer)  # without a head
    assert isinstance(classifier.layers[1].mlp, PEER)


def test_a_mixture_keeps_the_loss_of_its_other_routers():
    model = tiny_decoder("mixtral", output_router_logits=True)
    replace_feed_forward(model, [1], peer)
    output = model(IDS, labels=IDS)
    assert len(output.router_logits) == NUM_BLOCKS - 1
    assert output.aux_loss > 0


@pytest.mark.parametrize(
    ("family", "layers", "make", "message"),
    [
        ("opt", [1], peer, r"OPTForCausalLM must have one list of blocks .* got 0 such lists; .* OPTDecoderLayer"),
        ("bloom", [1], peer, r"BloomMLP of block 1 must take the hidden states alone, of width 32: .*'residual'"),
        ("llama", [3], peer, r"layers must be distinct numbers of blocks between 0 and 2, at least one, got \[3\]"),
        ("llama", [-1], peer, r"layers must be distinct .* got \[-1\]"),
        ("llama", [1, 1], peer, r"layers must be distinct .* got \[1, 1\]"),
        ("llama", [], peer, r"layers must be distinct .* got \[\]"),
        ("llama", [0, "1"], peer, r"layers must be distinct .* got \[0, '1'\]"),
        ("llama", [0, 1], lambda width: None, r"make must return a module, got NoneType"),
        ("llama", [1], lambda width: peer(48), r"two tokens \[1, 2, 32\] to as many, of torch.float32; PEER fails: "),
        ("llama", [1], lambda width: nn.Linear(width, 5), r"as many, .* got \[1, 2, 5\] of torch.float32 from Linear"),
        ("llama", [1], lambda width: nn.LSTM(width, width), r"as many, .* got tuple from LSTM"),
        ("llama", [1], lambda width: nn.Bilinear(width, 2, 2), r"Bilinear fails: .*'input2'"),
        ("llama", [1], lambda width: shared_by_ranks(peer(width)), "make must return a layer with its whole table"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_nothing_changed(family, layers, make, message):
    model = tiny_decoder(family)
    before = dict(model.named_modules())
    with pytest.raises(InputError, match=message):
        replace_feed_forward(model, layers, make)
    assert dict(model.named_modules()) == before
    assert all(part.training for part in before.values())
    assert not hasattr(model.config, "tinyexperts")


def test_a_block_is_replaced_once():
    model = replace_feed_forward(tiny_decoder("llama"), [1], peer)
    replace_feed_forward(model, [0], lambda width: nn.Linear(width, width))
    with pytest.raises(InputError, match=r"block 1 must have .* LlamaForCausalLM, got one replaced before, by .*PEER"):
        replace_feed_forward(model, [2, 1], peer)
    assert set(model.config.tinyexperts["feed_forward"]) == {"0", "1"}


def test_weights_that_are_not_there_are_refused():
    with pytest.raises(InputError, match=r"model must be a model of transformers .* got Linear"):
        replace_feed_forward(nn.Linear(2, 2), [0], peer)
    with torch.device("meta"):
        model = tiny_decoder("llama")
    with pytest.raises(InputError, match=r"LlamaMLP of block 1 must have its weights in memory, got one on the meta"):
        replace_feed_forward(model, [1], peer)
    model = tiny_decoder("llama")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(64, 32, dtype=torch.int8)
    with pytest.raises(InputError, match=r"block 1 must have weights of 16 bits or more, got int8"):
        replace_feed_forward(model, [1], peer)
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(InputError, match=r"Identity of block 1 must have weights, got none"):
        replace_feed_forward(model, [1], peer)


def test_blocks_that_differ():
    model = tiny_decoder("llama")
    del model.model.layers[2].mlp
    replace_feed_forward(model, [1], peer)
    with pytest.raises(InputError, match=r"block 2, LlamaDecoderLayer, must have one feed-forward layer .* got none"):
        replace_feed_forward(model, [2], peer)
    model.model.layers[0].ffn = nn.Identity()
    with pytest.raises(InputError, match=r"block 0, .* got mlp and ffn"):
        replace_feed_forward(model, [0], peer)
