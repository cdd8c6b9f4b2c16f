"""The decoder-only transformer, its configuration, and generation with a KV cache."""

from tinyexperts.model.config import (
    DenseConfig,
    ExpertChoiceMoEConfig,
    ExpertLayerConfig,
    PEERConfig,
    ProductKeyMemoryConfig,
    TransformerConfig,
)
from tinyexperts.model.evaluation_mode import evaluation_mode
from tinyexperts.model.generation import generate
from tinyexperts.model.transformer import Cache, Transformer

__all__ = [
    "Cache",
    "DenseConfig",
    "ExpertChoiceMoEConfig",
    "ExpertLayerConfig",
    "PEERConfig",
    "ProductKeyMemoryConfig",
    "Transformer",
    "TransformerConfig",
    "evaluation_mode",
    "generate",
]
