"""What the ranks of test_query_statistics.py do."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tinyexperts.errors import InputError
from tinyexperts.layers import PEER, ProductKeyMemory, share_query_statistics
from tinyexperts.layers.query_batch_norm import QueryBatchNorm
from tinyexperts.ops.rank_groups import RankGroups

D = 16
TOLERANCES = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}


class Model(nn.Module):
    """Two layers, each in a residual stream, that pass their mask on."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"num_heads": 2, "query_dim": 6, "dtype": dtype}
        self.peer = PEER(D, 64, experts_per_head=3, **options)
        self.memory = ProductKeyMemory(D, 49, experts_per_head=4, **options)
        with torch.no_grad():
            for norm in norms_of(self):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-1, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.peer(x, mask)
        return x + self.memory(x, mask)


def norms_of(module: nn.Module) -> list[QueryBatchNorm]:
    return [each for each in module.modules() if isinstance(each, QueryBatchNorm)]


def told_of(name: str, text: str) -> str:
    return f"{name}: {text}"


def batches(dtype: torch.dtype, counts: tuple[int, ...], masked: bool) -> list[tuple[torch.Tensor, ...]]:
    """For each step the tokens of all ranks, their outputs' gradients, and which are real."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(3):
        x, grad_y = torch.randn(2, sum(counts), D, generator=generator, dtype=dtype)
        x = x * torch.linspace(0.5, 3, sum(counts), dtype=dtype)[:, None] + 1  # ranks see different distributions
        mask = torch.rand(sum(counts), generator=generator) < (0.6 if masked else 2)
        made.append((x, grad_y * mask[:, None], mask))
    return made


def compare_with_one_process(
    rank: int, dtype: torch.dtype, counts: tuple[int, ...], masked: bool, momentum: float | None, copied: str
) -> None:
    """DistributedDataParallel averages gradients over the ranks; outputs and statistics are those of one process."""
    num_ranks = dist.get_world_size()
    whole = Model(dtype)
    for norm in norms_of(whole):
        norm.momentum = momentum
    ours: nn.Module = copy.deepcopy(whole)
    if copied == "inside":
        ours = DistributedDataParallel(copy.deepcopy(share_query_statistics(ours)))
    elif copied == "wrapped":
        ours = copy.deepcopy(share_query_statistics(DistributedDataParallel(ours)))
    elif copied == "twice":
        ours = DistributedDataParallel(copy.deepcopy(copy.deepcopy(share_query_statistics(ours))))
    else:
        ours = share_query_statistics(DistributedDataParallel(ours))
    assert all(norm.statistics_group is dist.group.WORLD for norm in norms_of(ours))
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    tolerance = TOLERANCES[dtype]
    for x, grad_y, mask in batches(dtype, counts, masked):
        x_whole, x_own = x.clone().requires_grad_(), x[own].clone().requires_grad_()
        y_whole = whole(x_whole, mask if masked else None)
        y_own = ours(x_own, mask[own] if masked else None)
        torch.testing.assert_close(y_own, y_whole[own], **tolerance)
        for module in (whole, ours):
            module.zero_grad()
        y_whole.backward(grad_y)
        y_own.backward(grad_y[own])
        torch.testing.assert_close(x_own.grad, x_whole.grad[own], **tolerance)
        for (name, parameter), other in zip(whole.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(num_ranks * other.grad, parameter.grad, msg=partial(told_of, name), **tolerance)
    for (name, buffer), other in zip(whole.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(other, buffer, msg=partial(told_of, name), **tolerance)
    assert all(norm.num_batches_tracked == 3 for norm in norms_of(ours))


def do_without_real_tokens(rank: int) -> None:
    """On one rank alone: the other's are the batch. On all: the running statistics are used and stay."""
    whole = Model(torch.float64)
    ours = share_query_statistics(copy.deepcopy(whole))
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    none, all_real = torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    y = ours(x[rank], all_real if rank else none)
    expected = whole(x.flatten(0, 1), torch.cat([none, all_real])).view(x.shape)[rank]
    torch.testing.assert_close(y, expected, **TOLERANCES[torch.float64])
    before = [buffer.clone() for buffer in ours.buffers()]
    y = ours(x[rank], none)
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, ours.buffers(), strict=True))
    torch.testing.assert_close(y, whole.eval()(x[rank]), **TOLERANCES[torch.float64])


def checkpoint_without_running_statistics(rank: int) -> None:
    whole = Model(torch.float64)
    ours = share_query_statistics(copy.deepcopy(whole))
    torch.func.replace_all_batch_norm_modules_(ours)
    x, grad_y = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    own = slice(0, 3) if rank == 0 else slice(3, 8)
    for use_reentrant in (True, False):
        ours.zero_grad()
        whole.zero_grad()
        y = whole(x)
        y.backward(grad_y)
        y_own = checkpoint(ours, x[own].clone().requires_grad_(), use_reentrant=use_reentrant)
        torch.testing.assert_close(y_own, y[own], **TOLERANCES[torch.float64])
        y_own.backward(grad_y[own])
        for (name, parameter), other in zip(whole.named_parameters(), ours.parameters(), strict=True):
            dist.all_reduce(other.grad)
            torch.testing.assert_close(
                other.grad, parameter.grad, msg=partial(told_of, name), **TOLERANCES[torch.float64]
            )
    assert not list(ours.buffers())
    alone = copy.deepcopy(whole)
    torch.func.replace_all_batch_norm_modules_(alone)
    for _ in range(rank + 1):  # evaluation exchanges nothing, so that one may make more passes than the other
        torch.testing.assert_close(ours.eval()(x[own]), alone.eval()(x[own]), **TOLERANCES[torch.float64])


def mask_with_a_shared_table(rank: int) -> None:
    """Ranks with as many tokens, of which different numbers are real."""
    options = {"num_heads": 2, "experts_per_head": 3, "query_dim": 6, "dtype": torch.float64}
    layers = []
    for ranks in (None, RankGroups(all_ranks=dist.group.WORLD, column_ranks=dist.group.WORLD)):
        torch.manual_seed(0)
        layers.append(PEER(128, 64, ranks=ranks, **options))
    whole, ours = layers
    x, grad_y = torch.randn(2, 2, 7, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[5], [2]])
    grad_y[~mask] = 0
    x_whole, x_own = x.clone().requires_grad_(), x[rank].clone().requires_grad_()
    y_whole, y_own = whole(x_whole, mask), ours(x_own, mask[rank])
    torch.testing.assert_close(y_own, y_whole[rank], **TOLERANCES[torch.float64])
    y_whole.backward(grad_y)
    y_own.backward(grad_y[rank])
    torch.testing.assert_close(x_own.grad, x_whole.grad[rank], **TOLERANCES[torch.float64])
    torch.testing.assert_close(ours.experts.grad, whole.experts.grad.chunk(2, -1)[rank], **TOLERANCES[torch.float64])
    for buffer, other in zip(ours.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, **TOLERANCES[torch.float64])


def keep_frozen(rank: int) -> None:
    """Each rank by itself: nothing is exchanged, so that one may make more passes than the other."""
    layer = share_query_statistics(PEER(D, 64, num_heads=2, experts_per_head=3, query_dim=6).requires_grad_(False))
    for _ in range(rank + 1):
        x = torch.randn(4 + rank, D)
        assert torch.equal(layer.train()(x), layer.eval()(x))
    assert layer.router.norm.num_batches_tracked == 0


def copy_and_pickle(rank: int) -> None:
    """In process groups of each rank's own too."""
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    layer = PEER(D, 64, num_heads=2, experts_per_head=3, query_dim=6)
    assert share_query_statistics(layer, alone) is layer
    copied = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert copied[0] is copied[1]
    assert copied[0] is not layer
    assert copied[0].router.norm.statistics_group is alone
    assert copied[0].router.norm.running_mean.data_ptr() != layer.router.norm.running_mean.data_ptr()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert layer.router.norm.statistics_group is alone
    assert loaded.router.norm.statistics_group is None
    x = torch.randn(3 + rank, D)
    expected = layer(x)
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(copied[1](x), expected)
    assert share_query_statistics(loaded).router.norm.statistics_group is dist.group.WORLD


def refuse(rank: int) -> None:
    model = nn.Sequential(PEER(D, 64, num_heads=2, experts_per_head=3, query_dim=6, query_norm="layer"))
    with pytest.raises(InputError, match="must hold a query batch norm whose statistics can be shared, got Sequential"):
        share_query_statistics(model)
    only_first = dist.new_group([0])
    layer = PEER(D, 64, num_heads=2, experts_per_head=3, query_dim=6)
    if rank == 0:
        assert share_query_statistics(layer, only_first).router.norm.statistics_group is only_first
    else:
        with pytest.raises(InputError, match="of which this process is a member, got -100"):
            share_query_statistics(layer, only_first)
        assert layer.router.norm.statistics_group is None
