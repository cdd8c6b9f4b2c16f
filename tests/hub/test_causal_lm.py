"""TinyExpertsForCausalLM: by value against our own Transformer, in all that transformers does with a model."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
)

from tinyexperts.errors import InputError
from tinyexperts.hub import TinyExpertsConfig, TinyExpertsForCausalLM, quantize_tables_
from tinyexperts.layers import DenseConfig, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import Transformer, TransformerConfig, generate

transformers.logging.disable_progress_bar()

PEER_SIZES = {"num_experts": 256, "num_heads": 2, "experts_per_head": 4, "query_dim": 16}
LAYERS = {
    "peer": PEERConfig(**PEER_SIZES),
    "gated": PEERConfig(**PEER_SIZES, gated=True, shared_sub_keys=False, query_norm="layer", router_weights="relu"),
    "pkm": ProductKeyMemoryConfig(**PEER_SIZES),
    "moe": ExpertChoiceMoEConfig(num_experts=4, hidden_dim=32),
    "dense": DenseConfig(hidden_dim=64),
}
NO_END = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}


def model_config(kind="peer", **options):
    sizes = {"vocab_size": 300, "context_length": 64, "d_model": 32, "num_layers": 3, "num_heads": 4}
    return TransformerConfig(
        **(sizes | {"num_key_value_heads": 2, "expert_layer": LAYERS[kind], "expert_blocks": (1, 2)} | options)
    )


def make_own(kind="peer", **options):
    """A model whose weights and running statistics are not those of the start."""
    torch.manual_seed(0)
    model = Transformer(model_config(kind, **options))
    with torch.no_grad():
        model.head.weight.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gated", "pkm"])
def test_quantized_tables_are_saved_and_loaded_as_they_are(kind, dtype, bits, tmp_path):
    own = make_own(kind, d_model=40)  # a last group of 8
    own.quantize_(bits)
    model = TinyExpertsForCausalLM.of(own)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    cast = own.to(dtype)
    for name, tensor in cast.state_dict().items():
        assert loaded.model.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert torch.equal(loaded(tokens()).logits, cast(tokens()))


def make(kind="peer", **options):
    return TinyExpertsForCausalLM.of(make_own(kind, **options), bos_token_id=0, eos_token_id=0, pad_token_id=0)


def tokens(batch=2, length=7, seed=0):
    return torch.randint(1, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved model, in several files."""
    folder = tmp_path_factory.mktemp("saved")
    make().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_a_new_model_has_the_weights_that_the_transformer_draws():
    torch.manual_seed(3)
    own = Transformer(model_config())
    torch.manual_seed(3)
    wrapped = TinyExpertsForCausalLM(TinyExpertsConfig.of(model_config()))
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, wrapped.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", list(LAYERS))
def test_logits_and_generation_equal_our_own(kind):
    own = make_own(kind)
    model = TinyExpertsForCausalLM.of(own)
    assert torch.equal(model(tokens()).logits, own(tokens()))
    expected = generate(own, tokens(), max_new_tokens=12, temperature=0)
    assert torch.equal(model.generate(tokens(), **NO_END, use_cache=False), expected)
    assert torch.equal(model.generate(tokens(), **NO_END), expected)
    assert torch.equal(
        model.generate(tokens(), **NO_END, cache_implementation="static", disable_compile=True), expected
    )


def test_eager_attention_equals_sdpa():
    model = make()
    expected = model(tokens()).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens()).logits, expected)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_left_padding_changes_no_generated_token(options):
    model = make()
    short, long = tokens(1, 3, seed=1), tokens(1, 7, seed=2)
    expected = [model.generate(each, **NO_END)[0, each.shape[1] :] for each in (short, long)]
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7])
    got = model.generate(batch, attention_mask=mask, **NO_END, **options)[:, 7:]
    assert torch.equal(got, torch.stack(expected))


@pytest.mark.parametrize("kind", ["peer", "moe"])
def test_padding_changes_nothing_of_a_training_step(kind):
    """Loss, gradients and running statistics of a padded batch are those of the same sequences without padding."""
    padded, alone = make(kind).train(), make(kind).train()
    sequences = tokens(2, 5)
    batch = torch.cat([torch.full((2, 3), 299), sequences], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = batch.masked_fill(mask == 0, -100)
    labels[:, 3] = -100  # padding predicts it
    first = padded(batch, attention_mask=mask, position_ids=positions, labels=labels).loss
    second = alone(sequences, attention_mask=torch.ones_like(sequences), labels=sequences).loss
    torch.testing.assert_close(first, second)
    first.backward()
    second.backward()
    for (name, ours), theirs in zip(padded.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(padded.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_packed_sequences_do_not_see_each_other():
    model = make()
    short, long = tokens(1, 3, seed=1), tokens(1, 7, seed=2)
    positions = torch.tensor([[*range(3), *range(7)]])
    packed = model(torch.cat([short, long], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :3], model(short).logits)
    torch.testing.assert_close(packed[:, 3:], model(long).logits)


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_the_same(kind, tied, tmp_path):
    model = make(kind, tied_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is TinyExpertsForCausalLM
    assert not loaded.training
    assert (loaded.model.head.weight is loaded.model.embedding.weight) == tied
    assert loaded.config.transformer() == model.model.config
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", ["peer", "pkm", "moe"])
def test_loaded_in_bf16_it_is_what_a_cast_makes_of_it(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = model.bfloat16()
    for name, tensor in cast.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(tokens()).logits, cast(tokens()).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", "on disk"])
def test_device_maps(device_map, saved, tmp_path):
    if device_map == "on disk":
        parts = ["embedding", "head", "norm", "blocks.0", "blocks.2"]
        device_map = {f"model.{part}": "cpu" for part in parts} | {"model.blocks.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(loaded(tokens()).logits, make()(tokens()).logits)


def test_on_the_meta_device_nothing_is_drawn():
    with torch.device("meta"):
        model = TinyExpertsForCausalLM(TinyExpertsConfig.of(model_config()))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["peer", "moe"])
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    plain, checkpointed = make(kind).train(), make(kind).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=2)
    computed = []
    for block in checkpointed.model.blocks:
        block.attention_norm.register_forward_hook(lambda *_, block=block: computed.append(block))
    for model in (plain, checkpointed):
        model(tokens(), labels=tokens()).loss.backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(plain.buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert [computed.count(block) for block in checkpointed.model.blocks] == [2, 1, 2]


def test_the_loss_is_our_own():
    model = make()
    expected = model.model.loss(tokens()[:, :-1], tokens()[:, 1:])
    torch.testing.assert_close(model(tokens(), labels=tokens()).loss, expected)


def test_resized_embeddings():
    model = make()
    before = model(tokens()).logits
    model.resize_token_embeddings(310, mean_resizing=False)
    assert model(torch.tensor([[305]])).logits.shape == (1, 1, 310)
    assert torch.equal(model(tokens()).logits[..., :300], before)
    assert model.config.transformer().vocab_size == model.model.config.vocab_size == 310


def test_other_ways_to_call_it():
    model = make()
    logits = model(tokens()).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens())).logits, logits)
    torch.testing.assert_close(model(tokens(), logits_to_keep=2).logits, logits[:, -2:])
    states = model(tokens(), output_hidden_states=True).hidden_states
    assert len(states) == 4
    torch.testing.assert_close(model.model.head(model.model.norm(states[-1])), logits)
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, logits)
    as_tuple = model(tokens(), return_dict=False)
    assert torch.equal(as_tuple[0], logits)
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(InputError, match="does not return attentions"):
        model(tokens(), output_attentions=True)


def test_a_cache_by_its_former_name_is_used():
    model, cache = make(), DynamicCache(config=make().config)
    logits = [model(part, past_key_values=cache).logits for part in tokens().split(4, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens()).logits)
    assert cache.get_seq_length() == 7
    with pytest.raises(InputError, match="give the cache once"):
        model(tokens(), cache=cache, past_key_values=cache)


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")  # PEFT's
def test_a_prefix_of_peft_changes_the_logits_and_is_trained():
    model = make()
    before = model(tokens()).logits
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    loss = tuned(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert not torch.allclose(tuned(input_ids=tokens()).logits, before)
    assert tuned.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


def test_a_mask_of_pairs_keeps_padding_out_too():
    padded, pairs = make().train(), make().train()
    mask = torch.tensor([[0] * 2 + [1] * 5, [1] * 7])
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    of_pairs = (causal & mask[:, None, None, :].bool()) & mask[:, None, :, None].bool()
    padded(tokens(), attention_mask=mask)
    pairs(tokens(), attention_mask=of_pairs)
    for (name, ours), theirs in zip(padded.named_buffers(), pairs.buffers(), strict=True):
        torch.testing.assert_close(theirs, ours, msg=name)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_in_python_it_is_saved_as_it_is(bits, tmp_path):
    model = quantize_tables_(make(), bits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.config.expert_layer.table_bits == bits
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    with pytest.raises(InputError, match="got GPT2LMHeadModel"):
        quantize_tables_(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), bits)


def test_beams_sampling_and_assistants():
    model = make()
    greedy = model.generate(tokens(1), **NO_END)
    assert torch.equal(model.generate(tokens(1), **NO_END, assistant_model=make("dense")), greedy)
    assert torch.equal(model.generate(tokens(1), **NO_END, prompt_lookup_num_tokens=3), greedy)
    beams = model.generate(tokens(), **(NO_END | {"max_new_tokens": 4}), num_beams=3)
    assert beams.shape == (2, 11)
    torch.manual_seed(0)
    drawn = model.generate(tokens(), max_new_tokens=4, do_sample=True, top_k=5, eos_token_id=None)
    allowed = model(drawn[:, :-1]).logits[:, -4:].topk(5).indices
    assert (allowed == drawn[:, -4:, None]).any(-1).all()


def damaged(saved, folder, change):
    """Copy the saved model with its tensors changed."""
    tensors = {}
    for path in saved.glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((saved / "config.json").read_text())


TABLE = "model.blocks.1.feed_forward.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (t.pop(TABLE), t.pop("model.norm.weight")), f"{TABLE} is missing, model.norm.weight is missing"),
        (lambda t: t.update(x=torch.zeros(1)), "x is unknown"),
        (lambda t: t.update({TABLE: t[TABLE][:100].clone()}), rf"{TABLE} has the shape \[100, 2, 32\], not \[256, 2"),
        (lambda t: t[TABLE][3, 1, 2:3].fill_(float("nan")), f"{TABLE} is not finite"),
        (lambda t: t["model.head.weight"][0].fill_(float("inf")), "model.head.weight is not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message, saved, tmp_path):
    damaged(saved, tmp_path, change)
    with pytest.raises(InputError, match=f"don't fit its config.json: {message}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_exprets": 3}, "no field num_exprets"),
        ({"expert_layer": {"kind": "peer", "num_exprets": 4}}, "expert_layer.num_exprets"),
        ({"expert_layer": {"num_experts": 4}}, "expert_layer.kind: must be one of .*, got None"),
        ({"expert_layer": {"kind": "peer", "num_experts": 17}}, "square"),
        ({"d_model": 33}, "d_model must be a multiple of"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_configurations_that_are_wrong_are_refused(fields, message, saved, tmp_path):
    content = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | fields))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_names_of_transformers_work_in_the_configuration():
    config = TinyExpertsConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=10)
    assert (config.d_model, config.num_layers, config.num_heads) == (32, 3, 2)
    assert config.transformer().d_model == config.hidden_size == 32
    assert config.head_dim == 16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers' own
@torch.no_grad()
def test_flex_attention_equals_sdpa():
    model = make()
    expected = model(tokens()).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(tokens()).logits, expected)


@pytest.mark.slow
def test_compiled_it_is_the_same():
    model = make()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits)
    expected = model.generate(tokens(), **NO_END)
    got = model.generate(
        tokens(),
        **NO_END,
        cache_implementation="static",
        compile_config=CompileConfig(fullgraph=True, backend="inductor", mode=None),
    )
    assert torch.equal(got, expected)
    plain, traced = make().train(), make().train()
    traced.forward = torch.compile(traced.forward, fullgraph=True)
    mask = torch.tensor([[0] * 2 + [1] * 5, [1] * 7])
    for each in (plain, traced):
        each(tokens(), attention_mask=mask, labels=tokens(), use_cache=False).loss.backward()
    for (name, ours), theirs in zip(plain.named_parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, msg=name)
