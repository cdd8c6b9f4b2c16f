"""The configuration of the transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from tinyexperts.errors import InputError, require_at_least
from tinyexperts.layers import DenseConfig, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig

ExpertLayerConfig: TypeAlias = DenseConfig | ExpertChoiceMoEConfig | ProductKeyMemoryConfig | PEERConfig


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer, of which some blocks carry the expert layer.

    Raises:
        InputError: a setting out of range, or settings that don't fit each other.
    """

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
    """One matrix for the token embedding and the head."""
    dense: DenseConfig = field(default_factory=DenseConfig)
    """Feed-forward layer of the other blocks."""
    expert_layer: ExpertLayerConfig = field(default_factory=PEERConfig)
    """Feed-forward layer of the blocks named by expert_blocks."""
    expert_blocks: tuple[int, ...] | None = None
    """Blocks that carry the expert layer, counted from 0; default: the middle one, num_layers // 2, as in the paper."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "num_key_value_heads"):
            require_at_least(1, name, getattr(self, name))
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
        """The number of heads of keys and values."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def blocks_with_experts(self) -> tuple[int, ...]:
        """The blocks that carry the expert layer."""
        return (self.num_layers // 2,) if self.expert_blocks is None else self.expert_blocks
