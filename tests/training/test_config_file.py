"""The JSON of a configuration: the round trip, what is refused, and files of version 1."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tinyexperts.errors import InputError
from tinyexperts.layers import ProductKeyMemoryConfig
from tinyexperts.training.config import with_settings
from tinyexperts.training.config_file import VERSION, from_json, to_json

KINDS = {"dense": "dense", "moe": "expert_choice_moe", "pkm": "product_key_memory", "peer": "peer"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_configuration_survives_json_with_its_version_and_kind(make_config, kind):
    model = {"expert_blocks": (0, 1), "num_key_value_heads": 1}
    config = make_config(kind, model, distributed={"mesh": (1, 2)}, schedule={"shape": "cosine"})
    read = from_json(to_json(config))
    assert read == config
    assert type(read.model.expert_layer) is type(config.model.expert_layer)
    content = json.loads(to_json(config))
    assert (content["version"], content["model"]["expert_layer"]["kind"]) == (VERSION, KINDS[kind])


def test_a_memory_keeps_its_options_and_without_them_is_what_it_always_was(make_config):
    layer = ProductKeyMemoryConfig(query_norm="layer_halves", router_weights="relu", shared_sub_keys=False)
    config = make_config("pkm", {"expert_layer": layer})
    assert from_json(to_json(config)).model.expert_layer == layer
    before = {f"model.expert_layer.{name}": None for name in ("router_weights", "shared_sub_keys")}
    read = from_json(changed(make_config("pkm"), **before))
    assert read == make_config("pkm")
    assert (read.model.expert_layer.router_weights, read.model.expert_layer.shared_sub_keys) == ("softmax", True)


def changed(config, **changes):
    """The JSON of a configuration with other values at some places, given by dotted names; None deletes."""
    content = json.loads(to_json(config))
    for name, value in changes.items():
        *parts, last = name.split(".")
        inner = content
        for part in parts:
            inner = inner[part]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, "^sed: Unexpected keyword argument"),
        ({"optimizer.sed": 1}, r"^optimizer\.sed: Unexpected keyword argument"),
        ({"model.dense.sed": 1}, r"^model\.dense\.sed: Unexpected keyword argument"),
        ({"model.expert_layer.sed": 1}, r"^model\.expert_layer\.sed: Unexpected keyword argument"),
        ({"model.expert_layer.num_heads": "x"}, r"^model\.expert_layer\.num_heads: Input should be a valid integer"),
        ({"model.expert_layer.kind": "peers"}, r"^model\.expert_layer\.kind: must be one of dense, .*, got 'peers'"),
        ({"model.expert_layer.kind": None}, r"^model\.expert_layer\.kind: must be one of dense, .*, got None"),
        ({"optimizer.weight_decay": -1.0}, r"^optimizer: Value error, optimizer\.weight_decay must be at least 0"),
        ({"data": None}, "^data: "),
        ({"model": 3}, "^model: "),
        ({"version": 3}, "^version 3 is not one that this tinyexperts reads, 1 to 2"),
        ({"version": "2"}, "^version 2 is not one"),
    ],
)
def test_what_is_no_configuration_is_refused_by_the_name_of_its_field(make_config, changes, message):
    with pytest.raises(InputError, match=message):
        from_json(changed(make_config(), **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(InputError, match=r"^the whole: "):
        from_json(text)


FLAT = {
    "num_steps": 7, "training_flops": None, "batch_size": 3, "gradient_accumulation": 2,
    "matrix_learning_rate": 1.0, "embedding_learning_rate": 2.0, "head_learning_rate": 3.0, "table_learning_rate": 4.0,
    "betas": [0.1, 0.2], "table_betas": [0.3, 0.4], "weight_decay": 5.0, "schedule": "cosine",
    "warmup_fraction": 0.3, "decay_fraction": 0.2, "gradient_clip": None, "table_gradients": "sparse",
    "table_second_moment": "row", "precision": "fp32", "device": "cpu", "mesh": [2, 1], "backend": "gloo",
    "timeout_seconds": 6.0, "threads": 2, "seed": 8, "log_every": 9, "validation_every": 10, "validation_tokens": 11,
    "checkpoint_every": 12, "asynchronous_checkpoints": True, "keep_checkpoints": 13,
}  # fmt: skip
LAYERS = {
    "dense": {"hidden_dim": 5, "activation": "relu"},
    "moe": {"num_experts": 4, "capacity_factor": 2.0, "hidden_dim": 16, "activation": "silu"},
    "pkm": {"num_values": 49, "num_heads": 3, "values_per_head": 5, "query_dim": 4, "query_norm": "none"},
    "peer": {
        "num_experts": 49, "num_heads": 3, "experts_per_head": 5, "query_dim": 4, "query_norm": "layer",
        "router_weights": "relu", "activation": "silu", "gated": True, "shared_sub_keys": False,
    },
}  # fmt: skip
# Options that came later, with the only value that there was.
SINCE_ADDED = {"pkm": {"router_weights": "softmax", "shared_sub_keys": True}}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_every_setting_of_version_1_is_read(make_config, kind):
    model = json.loads(to_json(make_config(kind)))["model"]
    model |= {"sparse_layer": LAYERS[kind], "layers_with_peer": [0]}
    del model["expert_layer"], model["expert_blocks"]
    config = from_json(json.dumps({"run": "r", "data": "d", "model": model, **FLAT}))
    layer = LAYERS[kind] | SINCE_ADDED.get(kind, {})
    for old, new in (("num_values", "num_experts"), ("values_per_head", "experts_per_head")):
        if old in layer:
            layer[new] = layer.pop(old)
    newer = {"table_bits": None} if kind in ("pkm", "peer") else {}
    assert dataclasses.asdict(config.model.expert_layer) == layer | newer
    expected = {"run": config.run, "data": config.data, "model.expert_blocks": (0,)} | {
        "num_steps": 7, "training_flops": None, "batch_size": 3, "gradient_accumulation": 2, "precision": "fp32",
        "device": "cpu", "threads": 2, "seed": 8, "log_every": 9, "validation_every": 10, "validation_tokens": 11,
        "optimizer.matrix_learning_rate": 1.0, "optimizer.embedding_learning_rate": 2.0,
        "optimizer.head_learning_rate": 3.0, "optimizer.table_learning_rate": 4.0, "optimizer.betas": (0.1, 0.2),
        "optimizer.table_betas": (0.3, 0.4), "optimizer.weight_decay": 5.0, "optimizer.gradient_clip": None,
        "optimizer.table_gradients": "sparse", "optimizer.table_second_moment": "row", "schedule.shape": "cosine",
        "schedule.warmup_fraction": 0.3, "schedule.decay_fraction": 0.2, "checkpoint.every": 12,
        "checkpoint.keep": 13, "checkpoint.asynchronous": True, "distributed.mesh": (2, 1),
        "distributed.backend": "gloo", "distributed.timeout_seconds": 6.0,
    }  # fmt: skip
    twin = make_config(kind, {"expert_layer": config.model.expert_layer})
    assert config == with_settings(twin, expected)
    with pytest.raises(InputError, match=r"^sed: Unexpected keyword argument"):
        from_json(json.dumps({"run": "r", "data": "d", "model": model, **FLAT, "sed": 1}))
