"""Feed-forward layers under one contract (feed_forward.py)."""

from tinyexperts.layers.dense import DenseConfig, DenseFFN
from tinyexperts.layers.expert_choice_moe import ExpertChoiceMoE, ExpertChoiceMoEConfig
from tinyexperts.layers.feed_forward import FeedForward, Flops, ParameterCount, ParameterGroups
from tinyexperts.layers.importers import from_peer_pytorch, from_product_key_memory
from tinyexperts.layers.peer import PEER, PEERConfig
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.layers.product_key_memory import ProductKeyMemory, ProductKeyMemoryConfig
from tinyexperts.layers.product_key_router import Routing
from tinyexperts.layers.query_batch_norm import share_query_statistics
from tinyexperts.layers.sum_of_layers import SumOfLayers
from tinyexperts.layers.table_layer import TableBits, TableLayer, quantize_tables_

__all__ = [
    "PEER",
    "DenseConfig",
    "DenseFFN",
    "ExpertChoiceMoE",
    "ExpertChoiceMoEConfig",
    "FeedForward",
    "Flops",
    "PEERConfig",
    "ParameterCount",
    "ParameterGroups",
    "ProductKeyLayer",
    "ProductKeyMemory",
    "ProductKeyMemoryConfig",
    "Routing",
    "SumOfLayers",
    "TableBits",
    "TableLayer",
    "from_peer_pytorch",
    "from_product_key_memory",
    "quantize_tables_",
    "share_query_statistics",
]
