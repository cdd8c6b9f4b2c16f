"""PEER: exact product-key retrieval over a million single-neuron experts, and what it takes to train with it."""

from typing import TYPE_CHECKING

from tinyexperts.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from tinyexperts.layers import PEER, DenseFFN, ExpertChoiceMoE, ProductKeyMemory
else:
    __getattr__, __dir__ = lazy_exports(__name__, __file__)

__version__ = "0.2.0"

__all__ = ["PEER", "DenseFFN", "ExpertChoiceMoE", "ProductKeyMemory", "__version__"]
