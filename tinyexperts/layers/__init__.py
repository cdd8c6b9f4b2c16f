"""Feed-forward layers under one contract (feed_forward.py)."""

from tinyexperts.layers.dense import DenseFFN
from tinyexperts.layers.expert_choice_moe import ExpertChoiceMoE
from tinyexperts.layers.feed_forward import FeedForward, Flops, ParameterCount, ParameterGroups
from tinyexperts.layers.peer import PEER
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.layers.product_key_memory import ProductKeyMemory
from tinyexperts.layers.product_key_router import Routing
from tinyexperts.layers.query_batch_norm import share_query_statistics

__all__ = [
    "PEER",
    "DenseFFN",
    "ExpertChoiceMoE",
    "FeedForward",
    "Flops",
    "ParameterCount",
    "ParameterGroups",
    "ProductKeyLayer",
    "ProductKeyMemory",
    "Routing",
    "share_query_statistics",
]
