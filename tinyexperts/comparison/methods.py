"""The methods that are compared: one row each, and the only place that lists them.

Colors are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colorblind readers distinguish; markers
differ too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyexperts.layers import DenseConfig, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import ExpertLayerConfig
from tinyexperts.ops.activation import Activation
from tinyexperts.training import TrainConfig, recipes


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """The sizes of every method's layer at one scale."""

    num_experts: int
    """Rows of a table, of PEER and of a product-key memory."""
    num_heads: int
    query_dim: int
    num_mixture_experts: int
    activation: Activation
    """The activation of dense layers and of a mixture's experts."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """The name and style of a method in tables and figures."""

    name: str
    label: str
    """The name for readers."""
    color: str = "#5b5f66"
    marker: str = "v"


@dataclass(frozen=True, kw_only=True)
class Method(Look):
    """A kind of feed-forward layer, as the studies know it."""

    recipe: Callable[[], TrainConfig]
    layer: Callable[[LayerSizes], ExpertLayerConfig]
    has_table: bool = False
    """The layer retrieves rows of a table, whose learning rate is tuned too."""

    @property
    def recipe_name(self) -> str:
        """The recipe as it is typed after `tinyexperts train`."""
        return self.recipe.__name__.replace("_", "-")


def _retrieval(sizes: LayerSizes) -> dict[str, Any]:
    return {"num_experts": sizes.num_experts, "num_heads": sizes.num_heads, "query_dim": sizes.query_dim}


# In the order of the paper's tables. A memory retrieves twice as many values as PEER retrieves experts, as there.
METHODS = (
    Method(
        name="dense",
        label="dense",
        recipe=recipes.dense,
        layer=lambda sizes: DenseConfig(activation=sizes.activation),
        color="#D55E00",
        marker="s",
    ),
    Method(
        name="moe",
        label="MoE",
        recipe=recipes.expert_choice_moe,
        layer=lambda sizes: ExpertChoiceMoEConfig(num_experts=sizes.num_mixture_experts, activation=sizes.activation),
        color="#CC79A7",
        marker="D",
    ),
    Method(
        name="pkm",
        label="PKM",
        recipe=recipes.product_key_memory,
        layer=lambda sizes: ProductKeyMemoryConfig(experts_per_head=32, **_retrieval(sizes)),
        has_table=True,
        color="#009E73",
        marker="^",
    ),
    Method(
        name="peer",
        label="PEER",
        recipe=recipes.peer,
        layer=lambda sizes: PEERConfig(experts_per_head=16, **_retrieval(sizes)),
        has_table=True,
        color="#0072B2",
        marker="o",
    ),
)
_BY_NAME = {name: method for method in METHODS for name in (method.name, method.recipe_name)}


def method_named(name: str) -> Method:
    """Return the method of a name or of a recipe's name."""
    return _BY_NAME[name]


def look_of(name: str) -> Look:
    """Return the look of a method by either of its names; an unknown one has a look of its own."""
    return _BY_NAME.get(name) or Look(name=name, label=name)


def label_of(name: str) -> str:
    """Return a method's name for readers."""
    return look_of(name).label
