"""What stands in place of a block's feed-forward layer, as config.json records it: `tinyexperts.feed_forward`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from tinyexperts.errors import InputError
from tinyexperts.layers import (
    PEER,
    DenseConfig,
    DenseFFN,
    ExpertChoiceMoE,
    ExpertChoiceMoEConfig,
    PEERConfig,
    ProductKeyLayer,
    ProductKeyMemory,
    ProductKeyMemoryConfig,
)
from tinyexperts.model import ExpertLayerConfig
from tinyexperts.training.config_file import layer_to_content, read_layer


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One block's new feed-forward layer."""

    class_name: str
    """Module and name of its class."""
    layer: ExpertLayerConfig | None
    """Its settings; None: a module that is none of this package's layers, which can't be made again."""
    sparse: bool = False
    """True if the gradient of its table is sparse."""
    num_outputs: int = 1
    """What the block expects of it: a tensor, or (above 1) a tuple whose first part is that tensor."""


def replacement_of(layer: nn.Module, num_outputs: int) -> Replacement:
    """Return the record of a new layer; `num_outputs` as in Replacement."""
    sparse = isinstance(layer, ProductKeyLayer) and layer.sparse
    class_name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    return Replacement(class_name=class_name, layer=_config_of(layer), sparse=sparse, num_outputs=num_outputs)


def _config_of(layer: nn.Module) -> ExpertLayerConfig | None:
    if type(layer) is DenseFFN:
        return DenseConfig(hidden_dim=layer.up.out_features, activation=layer.activation)
    if type(layer) is ExpertChoiceMoE:
        num_experts, _, hidden_dim = layer.up.shape
        return ExpertChoiceMoEConfig(
            num_experts=num_experts,
            capacity_factor=layer.capacity_factor,
            hidden_dim=hidden_dim,
            activation=layer.activation,
        )
    if type(layer) not in (PEER, ProductKeyMemory):
        return None
    assert isinstance(layer, PEER | ProductKeyMemory)
    router, (num_experts, num_vectors) = layer.router, layer.experts.shape[:2]
    of_both: dict[str, Any] = {
        "num_experts": num_experts,
        "num_heads": router.num_heads,
        "experts_per_head": router.experts_per_head,
        "query_dim": router.query_dim,
        "query_norm": router.query_norm,
        "router_weights": router.router_weights,
        "shared_sub_keys": router.sub_keys.ndim == 3,
        "table_bits": layer.table_bits,
    }
    if isinstance(layer, ProductKeyMemory):
        return ProductKeyMemoryConfig(**of_both)
    assert layer.activation is not None
    return PEERConfig(**of_both, activation=layer.activation, gated=num_vectors == 3)


def write_record(config: PreTrainedConfig, replacements: dict[int, Replacement]) -> None:
    """Write the replaced blocks into a model's configuration, and so into the config.json of its save_pretrained."""
    config.tinyexperts = {
        "feed_forward": {
            str(number): {
                **vars(each),
                "layer": None if each.layer is None else layer_to_content(each.layer),
            }
            for number, each in sorted(replacements.items())
        }
    }


def read_record(config: PreTrainedConfig) -> dict[int, Replacement]:
    """Return the replaced blocks of a model's configuration: none where it records none.

    Raises:
        InputError: a record that no replace_feed_forward has written.
    """
    content = getattr(config, "tinyexperts", None)
    if content is None:
        return {}
    try:
        return {int(number): _read(number, entry) for number, entry in content["feed_forward"].items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            "tinyexperts in the configuration must be what replace_feed_forward records there, got "
            f"{str(content)[:200]}"
        ) from None


def _read(number: str, entry: dict[str, Any]) -> Replacement:
    layer = entry["layer"]
    if layer is not None:
        layer = read_layer(layer, f"tinyexperts.feed_forward.{number}.layer.")
    return Replacement(**{**entry, "layer": layer})
