"""Padding in batches of somebody's decoder: real tokens train as they do without it."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_decoders import FAMILIES, VOCAB_SIZE, tiny_decoder
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from tinyexperts import PEER, ExpertChoiceMoE, ProductKeyMemory
from tinyexperts.errors import InputError
from tinyexperts.hub import replace_feed_forward
from tinyexperts.hub.real_tokens import real_tokens, tell_of_real_tokens
from tinyexperts.layers import SumOfLayers

LENGTHS = (7, 4, 1)
TOKENS = [torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def peer(width: int, **options) -> PEER:
    torch.manual_seed(1)
    return PEER(width, 64, **{"num_heads": 2, "experts_per_head": 3, "query_dim": 6, **options})


def padded(side: str) -> dict[str, torch.Tensor]:
    """A batch of the sequences, with positions counted from the first real token."""
    batch = {name: torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64) for name in ("ids", "mask", "positions")}
    for row, tokens in enumerate(TOKENS):
        place = slice(max(LENGTHS) - len(tokens), None) if side == "left" else slice(len(tokens))
        batch["ids"][row, place] = tokens
        batch["mask"][row, place] = 1
        batch["positions"][row, place] = torch.arange(len(tokens))
    return {"input_ids": batch["ids"], "attention_mask": batch["mask"], "position_ids": batch["positions"]}


def trained(model, batch, keep):
    """Logits of the real tokens, every gradient of a loss of theirs, and the running statistics."""
    logits = model(**batch, use_cache=False).logits[keep]
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **gradients, **dict(model.named_buffers())}


def trained_without_padding(family, make):
    """The same of the sequences one after the other, which transformers tells apart by their positions."""
    model = replace_feed_forward(tiny_decoder(family), [0, 2], make)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return trained(model, {"input_ids": torch.cat(TOKENS)[None], "position_ids": positions}, torch.ones(1, 12) > 0)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


# Without sdpa: gemma2 and gpt_oss, which doesn't tell sequences apart by their positions either.
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_oss"])
def test_real_tokens_train_as_without_padding(family, side):
    expected = trained_without_padding(family, peer)
    batch = padded(side)
    for attention in ("eager",) if family == "gemma2" else ("sdpa", "eager"):
        model = replace_feed_forward(tiny_decoder(family, attn_implementation=attention), [0, 2], peer)
        assert_same(trained(model, batch, batch["attention_mask"] > 0), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_is_told_of_them_in_training_alone(family, side):
    told = []
    model = replace_feed_forward(tiny_decoder(family), [1], peer)
    layer = next(part for part in model.modules() if isinstance(part, PEER))
    layer.register_forward_pre_hook(lambda layer, args, kwargs: told.append(kwargs.get("mask")), with_kwargs=True)
    batch = padded(side)
    model(**batch)
    model.eval()(**batch)
    assert torch.equal(told[0], batch["attention_mask"] > 0)
    assert told[1] is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_they_do_under_gradient_checkpointing(family, reentrant):
    def memory(width):
        torch.manual_seed(1)
        return ProductKeyMemory(width, 64, num_heads=2, experts_per_head=3, query_dim=6)

    expected = trained_without_padding(family, memory)
    model = replace_feed_forward(tiny_decoder(family), [0, 2], memory)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    batch = padded("left")
    other = {name: tensor.flip(0) for name, tensor in padded("right").items()}
    logits = model(**batch).logits
    model.eval()(**other)  # a forward pass of other padding, between the two of the same
    model.train()
    logits = logits[batch["attention_mask"] > 0]
    logits.square().mean().backward()
    got = {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    assert_same({**got, **dict(model.named_buffers())}, expected)


def test_two_batches_before_one_backward_pass():
    def loss_of(model):
        batches = [padded("left"), {name: tensor.flip(0) for name, tensor in padded("right").items()}]
        real = [model(**each, use_cache=False).logits[each["attention_mask"] > 0] for each in batches]
        return sum(logits.square().mean() for logits in real)

    plain = replace_feed_forward(tiny_decoder("llama"), [1], peer)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        loss_of(model).backward()
    for (name, expected), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_experts_choose_among_them_alone():
    def mixture(width):
        torch.manual_seed(1)
        return ExpertChoiceMoE(width, 3, hidden_dim=8)

    batch = padded("right")
    model = replace_feed_forward(tiny_decoder("llama"), [0, 2], mixture)
    expected = trained_without_padding("llama", mixture)
    assert_same(trained(model, batch, batch["attention_mask"] > 0), expected)


@pytest.mark.slow
def test_a_compiled_model_sees_them():
    expected = trained_without_padding("llama", peer)
    torch._dynamo.reset()
    model = replace_feed_forward(tiny_decoder("llama"), [0, 2], peer)
    model.compile(backend="aot_eager", fullgraph=True)
    batch = padded("left")
    assert_same(trained(model, batch, batch["attention_mask"] > 0), expected)


def test_a_copy_of_the_layer_sees_them():
    batch = padded("left")
    model = replace_feed_forward(tiny_decoder("llama"), [0, 2], peer)
    for number in (0, 2):  # as PEFT's modules_to_save
        model.model.layers[number].mlp = copy.deepcopy(model.model.layers[number].mlp)
    got = trained(copy.deepcopy(model), batch, batch["attention_mask"] > 0)
    assert_same(got, trained_without_padding("llama", peer))


def test_threads_keep_their_own_masks():
    both_have_attended = threading.Barrier(2, timeout=60)
    batches = [padded("left"), padded("right")]
    models = [replace_feed_forward(tiny_decoder("llama"), [1], peer) for _ in batches]
    expected = [copy.deepcopy(model)(**batch).logits for model, batch in zip(models, batches, strict=True)]

    def wait(*_):
        both_have_attended.wait()

    for model in models:
        model.model.layers[1].self_attn.register_forward_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(lambda model, batch: model(**batch).logits, models, batches))
    for logits, alone in zip(got, expected, strict=True):
        torch.testing.assert_close(logits, alone)


def test_frozen_norms_and_evaluation_need_no_mask():
    model = replace_feed_forward(tiny_decoder("llama"), [1], peer)
    batch = padded("left")
    layer = model.model.layers[1].mlp
    layer.router.norm.requires_grad_(False)
    before = layer.router.norm.running_mean.clone()
    frozen = model(**batch).logits
    torch.testing.assert_close(frozen, model.eval()(**batch).logits)
    model.train().generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
    assert torch.equal(layer.router.norm.running_mean, before)


def test_a_mask_that_tells_nothing_is_refused():
    model = replace_feed_forward(tiny_decoder("llama"), [1], peer)
    batch = padded("left")
    with pytest.raises(InputError, match=r"of the 1 tokens are padding, and .* shape \[3, 1, 1, 8\] .* model.eval\(\)"):
        model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3, eos_token_id=None)
    x = torch.zeros(2, 3, 4)
    for shape in ([2, 4], [3], [2, 1, 3, 4], [2, 1, 4, 3]):
        with pytest.raises(InputError, match="doesn't tell"):
            real_tokens(torch.ones(shape), x)


def test_a_layer_called_by_itself_after_its_model_has_no_mask():
    model = replace_feed_forward(tiny_decoder("llama"), [1], peer)
    model(**padded("left"))
    layer, x = model.model.layers[1].mlp, torch.randn(3, 7, 32)
    torch.testing.assert_close(layer(x), peer(32)(x))


def test_masks_of_every_kind():
    real = torch.tensor([[False, True, True], [True, True, True], [True, False, False]])
    x = torch.zeros(3, 3, 4)
    whole = torch.ones(3, 3, dtype=torch.bool).tril() & real[:, None]
    assert torch.equal(real_tokens(real, x), real)
    assert torch.equal(real_tokens(real.long(), x), real)
    assert torch.equal(real_tokens(whole[:, None].expand(-1, 4, -1, -1), x), real)
    for least in (-torch.inf, torch.finfo(torch.float16).min):
        added = torch.zeros(3, 1, 3, 3, dtype=torch.float16).masked_fill(~whole[:, None], least)
        assert torch.equal(real_tokens(added - 3 * torch.arange(3, dtype=torch.float16), x), real)  # with a bias
    assert torch.equal(real_tokens(torch.ones(1, 1, 3, 3).tril().log(), x), torch.ones(3, 3, dtype=torch.bool))

    def seen(sequence, head, query, key):
        return (key <= query) & real[sequence, key]

    mask = create_block_mask(seen, B=3, H=None, Q_LEN=3, KV_LEN=3, device="cpu")
    assert torch.equal(real_tokens(mask, x), real)
    causal = create_block_mask(lambda b, h, query, key: key <= query, B=None, H=None, Q_LEN=3, KV_LEN=3, device="cpu")
    assert real_tokens(causal, x).all()
    assert real_tokens(causal, x).shape == (3, 3)


def test_a_block_that_gives_nothing_a_mask():
    block = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"no part of Sequential is given an attention_mask: .* query norms 'layer'"):
        tell_of_real_tokens(peer(32), block)
    model = tiny_decoder("llama")
    model.model.layers[1].self_attn = nn.Identity()
    replace_feed_forward(model, [1], lambda width: peer(width, query_norm="layer"))


def test_a_sum_of_layers_leaves_out_padding_and_other_containers_are_refused():
    def total(width):
        return SumOfLayers([peer(width), ExpertChoiceMoE(width, 3, hidden_dim=8)])

    def made(width):
        torch.manual_seed(1)
        return total(width)

    batch = padded("left")
    model = replace_feed_forward(tiny_decoder("llama"), [0, 2], made)
    assert_same(trained(model, batch, batch["attention_mask"] > 0), trained_without_padding("llama", made))
    with pytest.raises(InputError, match="a PEER inside Sequential can't be told which tokens are padding"):
        replace_feed_forward(tiny_decoder("llama"), [0], lambda width: nn.Sequential(nn.RMSNorm(width), peer(width)))
    own_norm = lambda width: nn.Sequential(nn.RMSNorm(width), peer(width, query_norm="layer"))  # noqa: E731
    replace_feed_forward(tiny_decoder("llama"), [0], own_norm)
