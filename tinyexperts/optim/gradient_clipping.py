"""Clipping by the global norm over dense and sparse gradients together, without a pass over any table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.ops.expert_mlp.table_gradient import TableGradient
from tinyexperts.ops.expert_mlp.table_gradient_gpu import GpuTableGradient
from tinyexperts.ops.rank_groups import RankGroups
from tinyexperts.optim.sparse_gradients import coalesced_gradient

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_gradient_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float | None, ranks: RankGroups | None = None
) -> Tensor:
    """Scale all gradients in place so that their global L2 norm is at most `max_norm`.

    It equals torch.nn.utils.clip_grad_norm_ on the densified gradients. A sparse `.grad` that holds a row several times
    is replaced by its coalesced form, since the norm is that of the sums. A non-finite norm scales as in torch: check
    the result.

    Args:
        parameters (Tensor | Iterable[Tensor]): one or several; those without a gradient are skipped.
        max_norm (float | None): positive; None or inf only measures.
        ranks (RankGroups | None): the processes that share the parameters. All of them call this. DTensors (FSDP2) are
            spread over all ranks, the other parameters are tables shared by columns.

    Returns:
        norm (float, scalar): the global norm before scaling.

    Raises:
        InputError: max_norm is not positive.
    """
    if max_norm is not None and not max_norm > 0:
        raise InputError(f"max_norm must be positive, or None to measure only, got {max_norm}")
    parts: list[Tensor] = []
    gradients: list[Tensor] = []
    deferred: list[TableGradient | GpuTableGradient] = []
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is None:
            continue
        if (pairs := pending_gradient(parameter.grad)) is not None:
            deferred.append(pairs)
        elif parameter.grad.layout == torch.sparse_coo:
            parameter.grad = coalesced_gradient(parameter.grad)
            gradients.append(parameter.grad._values())
        elif ranks is not None and _is_part(parameter.grad):
            parts.append(parameter.grad.to_local())
        else:
            gradients.append(parameter.grad)
    total_norm = _norm(gradients, deferred)
    if ranks is not None:
        num_replicas = 1 if ranks.replica_ranks is None else ranks.replica_ranks.size()
        squares = _norm(parts, []).double().square() + total_norm.double().square() / num_replicas
        dist.all_reduce(squares, group=ranks.all_ranks)
        total_norm = squares.sqrt().to(total_norm.dtype)
    if max_norm is None or math.isinf(max_norm):
        return total_norm
    # As torch does: the clamped factor multiplies always, which spares a GPU the wait for a comparison.
    factor = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    for gradient in parts + gradients:
        gradient.mul_(factor.to(gradient.device))
    for pairs in deferred:
        pairs.scale_(factor)
    return total_norm


def _is_part(gradient: Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor  # takes seconds, and several ranks alone have them

    return isinstance(gradient, DTensor)


def _norm(gradients: list[Tensor], deferred: list[TableGradient | GpuTableGradient]) -> Tensor:
    # torch's norm of nothing is on its default device, which may not be the parameters'.
    total_norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device="cpu")
    if deferred:
        squares = sum(pairs.squared_norm() for pairs in deferred)
        total_norm = (total_norm.double().square() + squares).sqrt().to(total_norm.dtype)
    return total_norm
