"""The decoder-only transformer, its configuration, and generation with a KV cache."""

from tinyexperts.model.config import ExpertLayerConfig, TransformerConfig
from tinyexperts.model.evaluation_mode import evaluation_mode
from tinyexperts.model.generation import generate
from tinyexperts.model.transformer import Cache, Transformer

__all__ = ["Cache", "ExpertLayerConfig", "Transformer", "TransformerConfig", "evaluation_mode", "generate"]
