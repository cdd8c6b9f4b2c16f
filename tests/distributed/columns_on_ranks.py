"""What the ranks of test_columns.py do."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tinyexperts.errors import InputError
from tinyexperts.layers import PEER, ExpertChoiceMoE, ProductKeyMemory
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.ops.rank_groups import RankGroups
from tinyexperts.ops.without_kernels import without_kernels
from tinyexperts.optim import RowSparseAdam, deferred_gradients

D, N, M = 256, 64, 7  # tokens a rank


def make(
    kind: str, *, sparse: bool = True, dtype: torch.dtype = torch.float64, ranks: RankGroups | None = None
) -> ProductKeyLayer:
    torch.manual_seed(0)
    options = {"num_heads": 2, "query_dim": 6, "sparse": sparse, "dtype": dtype, "ranks": ranks}
    if kind == "memory":
        return ProductKeyMemory(D, N, experts_per_head=3, **options)
    return PEER(D, N, experts_per_head=5 if kind == "gated" else 4, gated=kind == "gated", **options)


def groups_of(rank: int, num_shards: int) -> RankGroups:
    """Neighbouring ranks share a table; ranks at the same place in their groups are replicas."""
    num_ranks = dist.get_world_size()
    columns = [dist.new_group(range(first, first + num_shards)) for first in range(0, num_ranks, num_shards)]
    replicas = [dist.new_group(range(place, num_ranks, num_shards)) for place in range(num_shards)]
    alone = num_ranks == num_shards
    return RankGroups(
        all_ranks=dist.group.WORLD,
        column_ranks=columns[rank // num_shards],
        replica_ranks=None if alone else replicas[rank % num_shards],
    )


def part(whole: torch.Tensor, rank: int, num_shards: int) -> torch.Tensor:
    return whole.chunk(num_shards, -1)[rank % num_shards]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def told_of(name: str, text: str) -> str:
    return f"{name}: {text}"


def compare_layers(rank: int, num_shards: int, portably: bool) -> None:
    num_ranks = dist.get_world_size()
    groups = groups_of(rank, num_shards)
    with without_kernels() if portably else nullcontext():
        _compare_layers(rank, num_shards, num_ranks, groups)


def _compare_layers(rank: int, num_shards: int, num_ranks: int, groups: RankGroups) -> None:
    for kind, sparse in (("neurons", True), ("neurons", False), ("gated", True), ("memory", False), ("memory", True)):
        whole = make(kind, sparse=sparse)
        ours = make(kind, sparse=sparse, ranks=groups)
        assert torch.equal(ours.experts, part(whole.experts, rank, num_shards)), "drawn as the whole"
        assert ours.experts.shape == (N, whole.experts.shape[1], D // num_shards)
        assert ours.flops_per_token() == whole.flops_per_token()
        assert ours.num_parameters() == whole.num_parameters()
        # Not contiguous: exchanges must not take over strides.
        x, grad_y = torch.randn(2, D, num_ranks * M, dtype=torch.float64).transpose(1, 2)
        own = slice(rank * M, (rank + 1) * M)
        x_whole, x_own = x.clone().requires_grad_(), x[own].clone().requires_grad_()
        routed: list[torch.Tensor] = []
        for layer in (whole, ours):
            layer.router.register_forward_hook(lambda _m, _x, routing, to=routed: to.append(routing.ids))
        y_whole, y_own = whole(x_whole), ours(x_own)
        assert torch.equal(routed[1], routed[0].view(num_ranks * M, -1)[own].view(routed[1].shape)), "same routing"
        torch.testing.assert_close(y_own, y_whole[own])
        y_whole.backward(grad_y)
        y_own.backward(grad_y[own])
        torch.testing.assert_close(x_own.grad, x_whole.grad[own])
        table_gradient = whole.experts.grad.to_dense() if sparse else whole.experts.grad
        assert (ours.experts.grad.layout == torch.sparse_coo) == sparse
        found = ours.experts.grad.to_dense() if sparse else ours.experts.grad
        torch.testing.assert_close(found, part(table_gradient, rank, num_shards))
        for (name, parameter), other in zip(ours.router.named_parameters(), whole.router.parameters(), strict=True):
            torch.testing.assert_close(summed(parameter.grad), other.grad, msg=partial(told_of, name))
        for (name, buffer), other in zip(ours.named_buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, msg=partial(told_of, name))
        x = torch.randn(num_ranks * M, D, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x[own]), whole.eval()(x)[own])


def train_layers(rank: int, num_shards: int) -> None:
    """Several steps with the fused optimiser: each rank's columns go where those of the whole table go."""
    num_ranks = dist.get_world_size()
    whole = make("neurons", dtype=torch.float32)
    ours = make("neurons", dtype=torch.float32, ranks=groups_of(rank, num_shards))
    optimizers = [RowSparseAdam([layer.experts], fused=True) for layer in (whole, ours)]
    own = slice(rank * M, (rank + 1) * M)
    for _ in range(4):
        x, grad_y = torch.randn(2, num_ranks * M, D)
        with deferred_gradients(optimizers):
            whole(x).backward(grad_y)
            ours(x[own]).backward(grad_y[own])
        assert pending_gradient(ours.experts.grad) is not None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(
        ours.experts.detach(), part(whole.experts.detach(), rank, num_shards), atol=1e-5, rtol=1e-4
    )
    replicas = [torch.empty_like(ours.experts) for _ in range(num_ranks)]
    dist.all_gather(replicas, ours.experts.detach())
    for other in range(rank % num_shards, num_ranks, num_shards):
        assert torch.equal(replicas[other], ours.experts), "replicas stay equal to the bit"


def compare_choices(rank: int) -> None:
    """Experts choose among the tokens of all ranks, and a rank of which none was chosen has gradients all the same."""
    num_ranks = dist.get_world_size()
    groups = groups_of(rank, num_ranks)
    layers = []
    for ranks in (None, groups):
        torch.manual_seed(0)
        layers.append(ExpertChoiceMoE(16, 3, capacity_factor=0.5, hidden_dim=8, dtype=torch.float64, ranks=ranks))
    whole, ours = layers
    x, grad_y = torch.randn(2, num_ranks * M, 16, dtype=torch.float64)
    own = slice(rank * M, (rank + 1) * M)
    x[own] *= rank * 10  # the experts' scores for the first rank's tokens are even, and none is chosen
    x_whole, x_own = x.clone().requires_grad_(), x[own].clone().requires_grad_()
    dist.all_gather_single(x_whole.data, x_own.data)
    y_whole, y_own = whole(x_whole), ours(x_own)
    torch.testing.assert_close(y_own, y_whole[own])
    assert (rank == 0) == (not y_own.any())
    y_whole.backward(grad_y)
    y_own.backward(grad_y[own])
    torch.testing.assert_close(x_own.grad, x_whole.grad[own])
    for (name, parameter), other in zip(ours.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(summed(parameter.grad), other.grad, msg=partial(told_of, name))
    torch.testing.assert_close(ours.threshold, whole.threshold)


def refuse(rank: int) -> None:
    groups = groups_of(rank, 2)
    for width, told in ((127, "127 columns can't be shared by 2 ranks"), (126, "leave at least 64 to each")):
        with pytest.raises(InputError, match=told):
            PEER(width, N, num_heads=1, experts_per_head=2, query_dim=4, ranks=groups)
    layer = make("neurons", ranks=groups)
    with pytest.raises(InputError, match='second_moment "row" is a mean over D'):
        RowSparseAdam([layer.experts], second_moment="row")


def copy_layer(rank: int) -> None:
    """A copy is shared by the same ranks, gives the same, and is known for a part of the columns."""
    layer = make("neurons", ranks=groups_of(rank, 2))
    twin = copy.deepcopy(layer)
    assert twin.ranks is layer.ranks
    assert twin.experts is not layer.experts
    x = torch.randn(2 * M, D, dtype=torch.float64)[rank * M : (rank + 1) * M]
    for each in (layer, twin):
        each(x).square().sum().backward()
        with pytest.raises(InputError, match='second_moment "row" is a mean over D'):
            RowSparseAdam([each.experts], second_moment="row")
    for got, expected in zip(twin.parameters(), layer.parameters(), strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(got.grad.to_dense(), expected.grad.to_dense())


def count_elements(rank: int) -> None:
    """An all-to-all keeps the own part, a gather sends its part to all others, a reduction sends each other theirs."""
    num_ranks = dist.get_world_size()
    others = num_ranks - 1
    sent = []

    def counted(collective, share):
        def call(output, given, **options):
            sent.append(share(given.numel()))
            return collective(output, given, **options)

        return call

    shares = {
        "all_to_all_single": lambda count: count * others // num_ranks,
        "all_gather_single": lambda count: count * others,
        "reduce_scatter_single": lambda count: count * others // num_ranks,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, share in shares.items():
            patch.setattr(dist, name, counted(getattr(dist, name), share))
        # Experts that are a value read no input: their columns of y alone, and coefficients.
        for kind, retrieved, operands, numbers in (("neurons", 2 * 4, 2, 2), ("memory", 2 * 3, 1, 1)):
            layer = make(kind, ranks=groups_of(rank, num_ranks))
            x = torch.randn(M, D, dtype=torch.float64, requires_grad=True)
            columns = operands * D * others // num_ranks
            sent.clear()
            y = layer(x)
            assert sum(sent) == M * (columns + (numbers + 1) * retrieved * others), f"{kind}, forward"
            sent.clear()
            y.sum().backward()
            assert sum(sent) == M * (columns + numbers * retrieved * others), f"{kind}, backward"
