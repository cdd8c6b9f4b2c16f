"""What the ranks of test_ddp.py run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tinyexperts import PEER
from tinyexperts.errors import InputError

M = 6


def be_told_of_sparse_gradients(rank: int) -> None:
    """A layer with sparse gradients is refused where it would be trained, and works where it is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), PEER(16, 49, num_heads=2, experts_per_head=3, query_dim=4, sparse=True))
    wrapped = DistributedDataParallel(model)
    x = torch.randn(M, 16)
    with pytest.raises(InputError, match=r"DistributedDataParallel can't sum the sparse gradient.*sparse=False"):
        wrapped(x)
    with torch.no_grad():
        assert torch.equal(wrapped.eval()(x), model(x))
    model[1].experts.requires_grad_(False)
    frozen = DistributedDataParallel(copy.deepcopy(model)).train()
    frozen(x).sum().backward()
    assert frozen.module[1].experts.grad is None
    model[1].experts.requires_grad_(True)
    model(x).sum().backward()  # by itself
    assert model[1].experts.grad.is_sparse


def train_as_one(rank: int) -> None:
    """With dense gradients, ranks train as one process does on the tokens of all."""
    torch.manual_seed(0)
    options = {"num_heads": 2, "experts_per_head": 3, "query_dim": 4, "query_norm": "layer", "dtype": torch.float64}
    whole = PEER(16, 49, **options)
    ours = DistributedDataParallel(copy.deepcopy(whole))
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.01) for module in (whole, ours)]
    size = dist.get_world_size()
    for _ in range(3):
        x = torch.randn(size * M, 16, dtype=torch.float64)
        whole(x).square().mean().backward()
        ours(x[rank * M : (rank + 1) * M]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for expected, got in zip(whole.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
