"""What clipping and the optimiser need of a table's sparse gradient: each touched row once, with its summed gradient.

The flag "coalesced" is lost on the way into `.grad`, and accumulation concatenates. torch's coalesce() sorts and
copies, so it is called only where rows can repeat: rows in strictly increasing order (what `expert_mlp` returns) can't.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.expert_mlp.table_gradient import TableGradient, asked_for


def rows_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the touched rows of a sparse gradient, each once and in increasing order, and their gradients.

    grad (float, sparse_coo [N, ...] with one sparse dimension): may hold a row several times
    returns rows (int64, [R]) and values (float, [R, ...]); views of `grad` where no row repeats

    Raises InputError where `grad` has more than one sparse dimension.
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
    return torch.sparse_coo_tensor(rows[None], values, grad.shape, is_coalesced=True, check_invariants=False)


def unwritten(table: Tensor) -> list[TableGradient]:
    """Return the one gradient that a backward pass left for a fused step, where it is all that the table has.

    What several passes left is summed into `.grad`, as autograd would have done.
    """
    left = asked_for(table) or []
    if len(left) == 1 and table.grad is None:
        return left
    for gradient in left:
        rows, values = gradient.rows_and_values()
        own = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
        table.grad = own if table.grad is None else table.grad + own
    left.clear()
    return []
