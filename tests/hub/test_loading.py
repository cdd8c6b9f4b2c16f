"""Saved and loaded again: equal to the bit, or refused by name."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_decoders import FAMILIES, VOCAB_SIZE, WIDTH, tiny_decoder
from torch import nn

from tinyexperts import PEER, DenseFFN, ExpertChoiceMoE, ProductKeyMemory
from tinyexperts.errors import InputError
from tinyexperts.hub import load_replaced, quantize_tables_, replace_feed_forward

IDS = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
SMALL = {"num_heads": 2, "experts_per_head": 3, "query_dim": 6}
LAYERS = {
    "peer": lambda width: PEER(width, 64, **SMALL),
    "gated": lambda width: PEER(
        width, 49, **SMALL, gated=True, shared_sub_keys=False, router_weights="sigmoid", query_norm="layer"
    ),
    "sparse": lambda width: PEER(width, 64, **SMALL, activation="relu2", query_norm="none", sparse=True),
    "memory": lambda width: ProductKeyMemory(width, 64, **SMALL),
    "memory of other kinds": lambda width: ProductKeyMemory(
        width, 64, **SMALL, query_norm="layer_halves", router_weights="sigmoid", shared_sub_keys=False
    ),
    "mixture": lambda width: ExpertChoiceMoE(width, 4, hidden_dim=8, capacity_factor=1.5, activation="relu"),
    "dense": lambda width: DenseFFN(width, 40, activation="silu"),
}


@pytest.fixture(autouse=True)
def _quiet():
    """transformers reports what it loads."""
    transformers.logging.disable_progress_bar()
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def trained(family="llama", kind="peer", layers=(1,)):
    """A model after two steps, so that no statistic is where it started."""
    model = replace_feed_forward(tiny_decoder(family), layers, LAYERS[kind])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def assert_equal(got, expected):
    left, right = got.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name], tensor), name


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, change):
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_the_saved_one(family, tmp_path):
    model = trained(family, layers=(0, 2))
    model.save_pretrained(tmp_path)
    loaded = load_replaced(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_equal(loaded, model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.to_dict()["tinyexperts"] == model.config.tinyexperts
    loaded.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path).keys()
    assert json.loads((tmp_path / "again/config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_with_its_settings(kind, tmp_path):
    model = trained(kind=kind) if kind != "sparse" else replace_feed_forward(tiny_decoder("llama"), [1], LAYERS[kind])
    model.save_pretrained(tmp_path)
    loaded = load_replaced(tmp_path)
    assert_equal(loaded, model)
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    layer, made = (each.model.layers[1].mlp for each in (loaded, model))
    assert type(layer) is type(made)
    plain = {name: value for name, value in vars(made).items() if isinstance(value, str | int | float | None)}
    assert {name: vars(layer)[name] for name in plain if name != "training"} == {
        name: value for name, value in plain.items() if name != "training"
    }
    for each in (loaded, model):  # as it trains, too
        each.train()(IDS, labels=IDS).loss.backward()
    for (name, expected), got in zip(made.named_parameters(), layer.named_parameters(), strict=True):
        assert got[1].grad.layout == expected.grad.layout
        assert torch.equal(got[1].grad.to_dense(), expected.grad.to_dense()), name


def test_what_the_configuration_records(tmp_path):
    trained(layers=(2, 0)).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["tinyexperts"]
    assert list(record["feed_forward"]) == ["0", "2"]
    assert record["feed_forward"]["2"] == {
        "class_name": "tinyexperts.layers.peer.PEER",
        "layer": {
            "kind": "peer",
            "num_experts": 64,
            "num_heads": 2,
            "experts_per_head": 3,
            "query_dim": 6,
            "query_norm": "batch",
            "router_weights": "softmax",
            "activation": "gelu",
            "gated": False,
            "shared_sub_keys": True,
        },
        "sparse": False,
        "num_outputs": 1,
    }


@pytest.mark.parametrize("kind", ["peer", "mixture"])
def test_in_bf16(kind, tmp_path):
    model = trained(kind=kind)
    model.save_pretrained(tmp_path / "wide")
    model.bfloat16().save_pretrained(tmp_path / "narrow", max_shard_size="20KB")
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) > 2
    for loaded in (load_replaced(tmp_path / "wide", dtype=torch.bfloat16), load_replaced(tmp_path / "narrow")):
        assert_equal(loaded, model)
        assert loaded.dtype == torch.bfloat16
        statistic = "router.norm.running_var" if kind == "peer" else "threshold"
        assert loaded.state_dict()[f"model.layers.1.mlp.{statistic}"].dtype == torch.float32
        assert loaded(IDS).logits.dtype == torch.bfloat16
    assert_equal(load_replaced(tmp_path / "narrow", dtype="float32"), load_replaced(tmp_path / "narrow").float())


def test_on_devices_and_disk(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    for place in ("auto", {"": "cpu"}):
        assert torch.equal(load_replaced(tmp_path, device_map=place)(IDS).logits, model(IDS).logits)
    parts = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), "cpu")
    blocks = {f"model.layers.{number}": "disk" if number else "cpu" for number in range(3)}
    loaded = load_replaced(tmp_path, device_map={**parts, **blocks}, offload_folder=os.fspath(tmp_path / "offload"))
    assert loaded.model.layers[1].mlp.experts.is_meta
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(InputError, match=r"LlamaMLP of block 2 must have its weights in memory, got one on the meta"):
        replace_feed_forward(loaded, [2], LAYERS["peer"])


def test_a_trained_model_goes_on_training_alike(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    loaded = load_replaced(tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    for each in (model.train(), loaded.train()):
        each(IDS, attention_mask=mask, labels=IDS).loss.backward()
    for (name, expected), got in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad), name
    assert_equal(loaded, model)


KEY = "model.layers.1.mlp."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(KEY + "experts"), r"don't fit its config\.json: .*mlp\.experts is missing"),
        (lambda tensors: tensors.pop(KEY + "router.norm.running_mean"), r"router\.norm\.running_mean is missing"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (
            lambda tensors: tensors.update({KEY + "down_proj.weight": torch.zeros(2)}),
            r"down_proj\.weight is unknown",
        ),
        (
            lambda tensors: tensors.update({KEY + "experts": torch.zeros(64, 3, WIDTH)}),
            r"mlp\.experts has the shape \[64, 3, 32\], not \[64, 2, 32\]",
        ),
        (lambda tensors: tensors[KEY + "experts"][3, 1, 2:3].fill_(torch.nan), r"mlp\.experts is not finite"),
        (
            lambda tensors: tensors.update({KEY + "router.sub_keys": torch.zeros(2, 8, 4)}),
            r"router\.sub_keys has the shape \[2, 8, 4\], not \[2, 8, 3\]",
        ),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused(change, message, tmp_path):
    trained().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_replaced(tmp_path)


def of_config(change):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def entry(content):
    return content["tinyexperts"]["feed_forward"]["1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("tinyexperts"), r"must have been saved after replace_feed_forward, but .* no record"),
        (lambda c: c.update(tinyexperts={"feed_forward": {}}), r"no record"),
        (lambda c: c.update(tinyexperts=3), r"must be what replace_feed_forward records there, got 3"),
        (lambda c: entry(c).pop("sparse") or entry(c).update(more=1), r"must be what replace_feed_forward records"),
        (lambda c: entry(c)["layer"].update(kind="peers"), r"feed_forward\.1\.layer\.kind: must be one of .*'peers'"),
        (lambda c: entry(c)["layer"].update(heads=3), r"feed_forward\.1\.layer\.heads: Unexpected keyword argument"),
        (lambda c: entry(c)["layer"].update(num_experts=65), r"must be a square .* got 65"),
        (lambda c: c.update(architectures=["Nothing"]), r"must be one class of transformers, got \['Nothing'\]"),
        (lambda c: c.update(architectures=["AutoConfig"]), r"must be one class of transformers"),
        (
            lambda c: c["tinyexperts"]["feed_forward"].update({"7": entry(c)}),
            r"distinct numbers of blocks .* got \[1, 7\]",
        ),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(change, message, tmp_path):
    trained().save_pretrained(tmp_path)
    of_config(change)(tmp_path)
    with pytest.raises(InputError, match=message):
        load_replaced(tmp_path)


def test_a_layer_of_somebody_else_is_named(tmp_path):
    model = replace_feed_forward(tiny_decoder("llama"), [1], lambda width: nn.Linear(width, width))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"block 1 of .* holds a torch.nn.modules.linear.Linear, .*load_state_dict"):
        load_replaced(tmp_path)


def test_a_plain_load_is_no_replaced_model(tmp_path):
    trained().save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(plain.model.layers[1].mlp, PEER)
    with pytest.raises(InputError, match=r"block 1 must have a feed-forward layer .* got one replaced before"):
        replace_feed_forward(plain, [1], LAYERS["peer"])
    plain.save_pretrained(tmp_path / "lost")
    with pytest.raises(InputError, match=r"don't fit its config\.json: .*mlp\.experts is missing"):
        load_replaced(tmp_path / "lost")


def test_options_of_from_pretrained(tmp_path):
    model = trained()
    model.bfloat16().save_pretrained(tmp_path)
    loaded, info = load_replaced(tmp_path, dtype="auto", output_loading_info=True)
    assert_equal(loaded, model)
    assert not info["missing_keys"]


@pytest.mark.parametrize("kind", ["peer", "memory"])
def test_quantized_tables_are_recorded(kind, tmp_path):
    model = quantize_tables_(trained(kind=kind), 8)
    model.save_pretrained(tmp_path)
    loaded = load_replaced(tmp_path)
    assert loaded.model.layers[1].mlp.table_bits == 8
    assert_equal(loaded, model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
