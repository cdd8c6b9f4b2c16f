"""Pairs that are timed and weighed: a layer of theirs, and ours with the same weights, each with its optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam

from peer_package_parts.layers import Foreign, Sizes, imported, peer_pytorch, product_key_memory, tables_of
from tinyexperts.bench.contestants import Contestant
from tinyexperts.layers import DenseFFN, FeedForward
from tinyexperts.optim import RowSparseAdam

LEARNING_RATE = 1e-3
THEIRS: dict[str, Callable[[Sizes], nn.Module]] = {
    "PEER-pytorch, softmax of K": partial(peer_pytorch, non_competing_scores=False),
    "PEER-pytorch, default (1 a head)": peer_pytorch,
    "product-key-memory": product_key_memory,
}
DENSE = "dense, equal FLOPs"


def with_adam(layer: nn.Module) -> Contestant:
    """Return a layer with dense gradients and fused AdamW for all."""
    return Contestant(module=layer, optimizers=[AdamW(layer.parameters(), lr=LEARNING_RATE, fused=True)])


def with_sparse_adam(theirs: Foreign) -> Contestant:
    """Return a layer of theirs with sparse gradients of its tables, SparseAdam for these, and AdamW for the rest."""
    tables = tables_of(theirs)
    for table in tables:
        table.sparse = True
    weights = [table.weight for table in tables]
    rest = [parameter for parameter in theirs.parameters() if all(parameter is not weight for weight in weights)]
    optimizers: list[Optimizer] = [SparseAdam(weights, lr=LEARNING_RATE), AdamW(rest, lr=LEARNING_RATE, fused=True)]
    return Contestant(module=theirs, optimizers=optimizers)


def ours_of(theirs: nn.Module) -> Contestant:
    """Return our layer with copies of their weights, trained as this package does."""
    layer: Any = imported(theirs)
    layer.sparse = True
    groups = layer.parameter_groups()
    optimizers: list[Optimizer] = [
        RowSparseAdam(groups.tables, lr=LEARNING_RATE, fused=True),
        AdamW(groups.dense, lr=LEARNING_RATE, fused=True),
    ]
    return Contestant(module=layer, optimizers=optimizers)


def settle(contestant: Contestant, x_MD: Tensor, grad_y_MD: Tensor) -> None:
    """Take a step, then write all of the optimizers' state, so that no later step waits for its memory.

    Args:
        contestant (Contestant): the layer.
        x_MD (float32, [M, D]): its tokens.
        grad_y_MD (float32, [M, D]): the gradient of its output.
    """
    contestant.step(x_MD, grad_y_MD)
    for tensor in state_tensors(contestant):
        if tensor.dim():
            tensor.zero_()


def state_tensors(contestant: Contestant) -> list[Tensor]:
    """Return the tensors of the optimizers' states; a count of steps may be a number."""
    states = [state for optimizer in contestant.optimizers for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def foreign(theirs: nn.Module, ours: Contestant) -> Foreign:
    """Return their layer under our contract."""
    assert isinstance(ours.module, FeedForward)
    return Foreign(theirs, ours.module)


def dense_of_equal_flops(ours: Contestant, d_model: int) -> DenseFFN:
    """Return a dense layer that takes as many FLOPs as ours, router counted, up to half a hidden neuron's."""
    layer: Any = ours.module
    return DenseFFN(d_model, max(1, round(layer.flops_per_token().total / (4 * d_model))))


def check_equal(theirs: nn.Module, ours: nn.Module, x_MD: Tensor) -> None:
    """Check that two layers give the same outputs and gradients of the tokens.

    Args:
        theirs (nn.Module): their layer, under our contract.
        ours (nn.Module): ours.
        x_MD (float32, [M, D]): tokens.

    Raises:
        AssertionError: they differ by more than roundings.
    """
    found = []
    for layer in (theirs, ours):
        leaf = x_MD.detach().clone().requires_grad_()
        y_MD = layer(leaf)
        (gradient,) = torch.autograd.grad(y_MD.square().sum(), leaf)
        found.append((y_MD.detach(), gradient))
    for their, our in zip(*found, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4 * float(their.abs().max()))
