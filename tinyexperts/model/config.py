"""The configuration of the transformer and of its feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tinyexperts.errors import InputError
from tinyexperts.layers import PEER, DenseFFN, ExpertChoiceMoE, FeedForward, ProductKeyMemory
from tinyexperts.layers.product_key_router import QueryNorm, RouterWeights
from tinyexperts.ops.activation import Activation
from tinyexperts.ops.rank_groups import RankGroups

_STRICT = {"extra": "forbid"}  # in a saved configuration the names of the fields tell the four kinds apart


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """A dense feed-forward layer."""

    __pydantic_config__ = _STRICT

    hidden_dim: int | None = None
    """Hidden neurons; default: 4 * d_model."""
    activation: Activation = "gelu"
    """Activation of the hidden neurons."""

    def build(
        self, d_model: int, *, sparse: bool = False, device: Any = None, ranks: RankGroups | None = None
    ) -> FeedForward:
        return DenseFFN(d_model, self.hidden_dim, activation=self.activation, device=device)


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceMoEConfig:
    """An expert-choice mixture of dense experts."""

    __pydantic_config__ = _STRICT

    num_experts: int = 128
    """Experts."""
    capacity_factor: float = 1.0
    """Experts a token gets on average."""
    hidden_dim: int | None = None
    """Hidden neurons of one expert; default: 4 * d_model."""
    activation: Activation = "gelu"
    """Activation of the hidden neurons."""

    def build(
        self, d_model: int, *, sparse: bool = False, device: Any = None, ranks: RankGroups | None = None
    ) -> FeedForward:
        return ExpertChoiceMoE(
            d_model,
            self.num_experts,
            capacity_factor=self.capacity_factor,
            hidden_dim=self.hidden_dim,
            activation=self.activation,
            device=device,
            ranks=ranks,
        )


@dataclass(frozen=True, kw_only=True)
class ProductKeyMemoryConfig:
    """A product-key memory."""

    __pydantic_config__ = _STRICT

    num_values: int = 1024**2
    """Values, a square."""
    num_heads: int = 8
    """Queries a token."""
    experts_per_head: int = 32
    """Values that each query retrieves."""
    query_dim: int = 128
    """Width of a query, even."""
    query_norm: QueryNorm = "batch"
    """Normalisation of the queries."""

    def build(
        self, d_model: int, *, sparse: bool = False, device: Any = None, ranks: RankGroups | None = None
    ) -> FeedForward:
        return ProductKeyMemory(
            d_model,
            self.num_values,
            num_heads=self.num_heads,
            experts_per_head=self.experts_per_head,
            query_dim=self.query_dim,
            query_norm=self.query_norm,
            sparse=sparse,
            device=device,
            ranks=ranks,
        )


@dataclass(frozen=True, kw_only=True)
class PEERConfig:
    """A PEER layer."""

    __pydantic_config__ = _STRICT

    num_experts: int = 1024**2
    """Single-neuron experts, a square."""
    num_heads: int = 8
    """Queries a token."""
    experts_per_head: int = 16
    """Experts that each query retrieves."""
    query_dim: int = 128
    """Width of a query, even."""
    query_norm: QueryNorm = "batch"
    """Normalisation of the queries."""
    router_weights: RouterWeights = "softmax"
    """How scores become router weights."""
    activation: Activation = "gelu"
    """Activation of the experts."""
    gated: bool = False
    """Whether experts are gated neurons."""
    shared_sub_keys: bool = True
    """Whether the heads share the product keys, as in the paper."""

    def build(
        self, d_model: int, *, sparse: bool = False, device: Any = None, ranks: RankGroups | None = None
    ) -> FeedForward:
        return PEER(
            d_model,
            self.num_experts,
            num_heads=self.num_heads,
            experts_per_head=self.experts_per_head,
            query_dim=self.query_dim,
            query_norm=self.query_norm,
            router_weights=self.router_weights,
            activation=self.activation,
            gated=self.gated,
            shared_sub_keys=self.shared_sub_keys,
            sparse=sparse,
            device=device,
            ranks=ranks,
        )


ExpertLayerConfig: TypeAlias = DenseConfig | ExpertChoiceMoEConfig | ProductKeyMemoryConfig | PEERConfig


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer, of which some blocks carry the sparse layer."""

    __pydantic_config__ = _STRICT

    vocab_size: int
    """Tokens of the vocabulary."""
    context_length: int
    """Longest sequence, in tokens."""
    d_model: int
    """Width."""
    num_layers: int
    """Blocks."""
    num_heads: int
    """Attention heads."""
    num_key_value_heads: int | None = None
    """Heads of keys and values, shared by groups of attention heads; default: num_heads."""
    tied_embeddings: bool = False
    """Whether the head is the token embedding."""
    dense: DenseConfig = field(default_factory=DenseConfig)
    """Feed-forward layer of the other blocks."""
    expert_layer: ExpertLayerConfig = field(default_factory=PEERConfig)
    """Feed-forward layer of the blocks named by expert_blocks."""
    expert_blocks: tuple[int, ...] | None = None
    """Blocks that carry the sparse layer, counted from 0; default: the middle one, num_layers // 2, as in the paper."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "num_key_value_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.d_model % (2 * self.num_heads):
            raise InputError(
                f"d_model must be a multiple of 2 * num_heads = {2 * self.num_heads} (rotary embedding turns pairs), "
                f"got {self.d_model}"
            )
        if self.num_heads % self.key_value_heads:
            raise InputError(
                f"num_key_value_heads must divide num_heads = {self.num_heads}, got {self.num_key_value_heads}"
            )
        blocks = self.blocks_with_experts
        if len(set(blocks)) != len(blocks) or not all(0 <= block < self.num_layers for block in blocks):
            raise InputError(
                f"expert_blocks must be distinct blocks between 0 and {self.num_layers - 1}, got {list(blocks)}"
            )
        if not self.rope_theta > 0 or not self.norm_eps > 0:
            raise InputError(f"rope_theta and norm_eps must be positive, got {self.rope_theta} and {self.norm_eps}")
        # The layers check their own settings; on the meta device that costs nothing.
        self.dense.build(self.d_model, device="meta")
        self.expert_layer.build(self.d_model, device="meta")

    @property
    def key_value_heads(self) -> int:
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def blocks_with_experts(self) -> tuple[int, ...]:
        return (self.num_layers // 2,) if self.expert_blocks is None else self.expert_blocks
