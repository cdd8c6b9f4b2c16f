"""A table's sparse gradient as clipping and the optimizer need it: each touched row once, with its sum.

The flag "coalesced" is lost on the way into `.grad`, and accumulation concatenates. torch's coalesce() sorts and
copies, so it is called only where rows can repeat: rows in strictly increasing order (as from `expert_mlp`) can't.
"""

from __future__ import annotations

from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.expert_mlp.row_sums import sparse_gradient


def rows_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the touched rows of a sparse gradient, each once and in increasing order, and their gradients.

    Args:
        grad (float, sparse_coo [N, ...] with one sparse dimension): may hold a row several times.

    Returns:
        rows (int64, [R]) and values (float, [R, ...]): views of `grad` if no row repeats.

    Raises:
        InputError: `grad` has more than one sparse dimension.
    """
    if grad.sparse_dim() != 1:
        raise InputError(f"a table's gradient must have one sparse dimension, got {grad.sparse_dim()}")
    if not grad.is_coalesced():
        rows = grad._indices()[0]
        if not bool((rows[1:] > rows[:-1]).all()):
            grad = grad.coalesce()
    return grad._indices()[0], grad._values()


def coalesced_gradient(grad: Tensor) -> Tensor:
    """Return `grad` flagged as coalesced; it shares its values with `grad` where no row repeats."""
    rows, values = rows_and_values(grad)
    return sparse_gradient(rows, values, grad.shape)
