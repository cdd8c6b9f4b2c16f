"""PEER: exact product-key retrieval over a million single-neuron experts, and what it takes to train with it."""

from tinyexperts.layers import PEER, DenseFFN, ExpertChoiceMoE, ProductKeyMemory

__version__ = "0.1.0"

__all__ = ["PEER", "DenseFFN", "ExpertChoiceMoE", "ProductKeyMemory", "__version__"]
