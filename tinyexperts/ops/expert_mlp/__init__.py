"""The weighted sum of the experts that each token retrieved (paper, section 2)."""

from tinyexperts.ops.expert_mlp.int4 import quantize_groups
from tinyexperts.ops.expert_mlp.int8 import quantize_vectors
from tinyexperts.ops.expert_mlp.operator import expert_mlp

__all__ = ["expert_mlp", "quantize_groups", "quantize_vectors"]
