"""Differentiable operators of the sparse layers: tensors in, tensors out, no modules."""

from tinyexperts.ops.expert_mlp import expert_mlp, quantize_groups, quantize_vectors
from tinyexperts.ops.product_key_topk import product_key_topk
from tinyexperts.ops.row_adam import row_adam_

__all__ = ["expert_mlp", "product_key_topk", "quantize_groups", "quantize_vectors", "row_adam_"]
