"""The JSON of a TrainConfig, as run folders and studies keep it: version 2, and the upgrade of version 1.

Version 1 (without a number) had all settings of training side by side. A layer's kind followed from its fields, some of
which had other names.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json as parse_json

from tinyexperts.errors import InputError
from tinyexperts.model import ExpertLayerConfig, TransformerConfig
from tinyexperts.training.config import OptimizerConfig, TrainConfig

VERSION = 2

KINDS = {layer.kind: layer for layer in get_args(ExpertLayerConfig)}

# Version 1: the settings that have moved into a group, and the other names of fields of the model and its layers.
_GROUPS = ("optimizer", "schedule", "checkpoint", "distributed")
_MOVED = {
    **{field.name: f"optimizer.{field.name}" for field in fields(OptimizerConfig)},
    "schedule": "schedule.shape",
    "warmup_fraction": "schedule.warmup_fraction",
    "decay_fraction": "schedule.decay_fraction",
    "checkpoint_every": "checkpoint.every",
    "keep_checkpoints": "checkpoint.keep",
    "asynchronous_checkpoints": "checkpoint.asynchronous",
    "mesh": "distributed.mesh",
    "backend": "distributed.backend",
    "timeout_seconds": "distributed.timeout_seconds",
}
_RENAMED = {
    "sparse_layer": "expert_layer",
    "layers_with_peer": "expert_blocks",
    "num_values": "num_experts",
    "values_per_head": "experts_per_head",
}
# The field by which a layer of version 1 was known, in this order; every layer of it has all of its fields.
_KIND_OF_FIELD = {
    "capacity_factor": "expert_choice_moe",
    "num_values": "product_key_memory",
    "gated": "peer",
    "": "dense",
}


def to_json(config: TrainConfig) -> str:
    """Return the text of a configuration's file."""
    return json.dumps(to_content(config), indent=2)


def from_json(text: str | bytes) -> TrainConfig:
    """Return the configuration that a file of this version or of an earlier one holds.

    Raises:
        InputError: it is no JSON, a field is unknown, missing or bad, or a later version wrote it.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise InputError(f"the whole: Invalid JSON: {error}") from None
    return from_content(content)


def to_content(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as plain values for JSON, with the version and the kind of its expert layer."""
    content = _adapter(TrainConfig).dump_python(config, mode="json")
    return {"version": VERSION, **content, "model": model_to_content(config.model)}


def model_to_content(model: TransformerConfig) -> dict[str, Any]:
    """Return a model's configuration as plain values for JSON, with the kind of its expert layer."""
    content = _adapter(TransformerConfig).dump_python(model, mode="json")
    return {**content, "expert_layer": layer_to_content(model.expert_layer)}


def layer_to_content(layer: ExpertLayerConfig) -> dict[str, Any]:
    """Return a layer's configuration as plain values for JSON, with its kind."""
    content = {"kind": layer.kind, **vars(layer)}
    if content.get("table_bits") is None:  # of a layer that is trained: versions without quantized tables read it
        content.pop("table_bits", None)
    return content


def model_from_content(content: Any) -> TransformerConfig:
    """Return the configuration of a model from plain values of this version.

    Raises:
        InputError: a field, which is named, is unknown, missing or bad.
    """
    config: TransformerConfig = _read(TransformerConfig, _with_layer(content, ""), "")
    return config


def from_content(content: Any) -> TrainConfig:
    """Return the configuration of plain values from JSON.

    Raises:
        InputError: a field, which is named, is unknown, missing or bad, or a later version wrote it.
    """
    version = content.get("version", 1) if isinstance(content, dict) else VERSION
    if version not in range(1, VERSION + 1):
        raise InputError(f"version {version} is not one that this tinyexperts reads, 1 to {VERSION}")
    if version == 1:
        content = _upgrade(content)
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name != "version"}
        if "model" in content:
            content["model"] = _with_layer(content["model"], "model.")
    config: TrainConfig = _read(TrainConfig, content, "")
    return config


def _with_layer(model: Any, place: str) -> Any:
    """Return the content of a model with its expert layer read; anything else as it is."""
    if not isinstance(model, dict) or not isinstance(model.get("expert_layer"), dict):
        return model
    return {**model, "expert_layer": read_layer(model["expert_layer"], f"{place}expert_layer.")}


def read_layer(content: dict[str, Any], place: str) -> ExpertLayerConfig:
    """Return a layer's configuration from plain values, of which `kind` is one.

    Args:
        content (dict[str, Any]): the values.
        place (str): where they stand, for the error; it ends in a dot.

    Raises:
        InputError: a field, which is named, is unknown, missing or bad.
    """
    kind = content.get("kind")
    if kind not in KINDS:
        raise InputError(f"{place}kind: must be one of {', '.join(KINDS)}, got {kind!r}")
    content = {name: value for name, value in content.items() if name != "kind"}
    layer: ExpertLayerConfig = _read(KINDS[kind], content, place)
    return layer


def _read(kind: Any, content: Any, place: str) -> Any:
    try:
        value = _adapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{(place + '.'.join(map(str, first['loc']))) or 'the whole'}: {first['msg']}") from None
    for name in _unknown_fields(value, content):
        raise InputError(f"{place}{name}: Unexpected keyword argument")
    return value


@functools.cache  # it takes longer to make than to use, and a study reads hundreds of configurations
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _unknown_fields(value: Any, content: dict[str, Any]) -> Iterator[str]:
    names = {field.name for field in fields(value)}
    for name, inner in content.items():
        if name not in names:
            yield name
            continue
        found = getattr(value, name)
        several = zip(found, inner, strict=True) if isinstance(inner, list) else [(found, inner)]
        for part, inside in several:
            if is_dataclass(part) and isinstance(inside, dict):
                yield from (f"{name}.{each}" for each in _unknown_fields(part, inside))


def _upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of version 2 from that of version 1; an unknown field stays, to be refused by its name."""
    upgraded: dict[str, Any] = {name: {} for name in _GROUPS}
    for name, value in content.items():
        group, _, new_name = _MOVED.get(name, name).rpartition(".")
        (upgraded[group] if group else upgraded)[new_name] = value
    model = content.get("model")
    if isinstance(model, dict):
        model = {_RENAMED.get(name, name): value for name, value in model.items()}
        layer = model.get("expert_layer")
        if isinstance(layer, dict):
            kind = next(kind for field, kind in _KIND_OF_FIELD.items() if not field or field in layer)
            layer = {_RENAMED.get(name, name): value for name, value in layer.items()}
            model["expert_layer"] = {"kind": kind, **layer}
        upgraded["model"] = model
    return upgraded
