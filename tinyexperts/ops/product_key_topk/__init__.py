"""Exact retrieval of the experts of highest score by product keys (paper, section 2)."""

from tinyexperts.ops.product_key_topk.operator import product_key_topk

__all__ = ["product_key_topk"]
