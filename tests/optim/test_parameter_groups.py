"""Parameter kinds and the optimizers made of them; the expected share of touched rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tinyexperts import PEER, DenseFFN
from tinyexperts.errors import InputError
from tinyexperts.optim import (
    RowSparseAdam,
    build_optimizers,
    expected_touched_share,
    scale_learning_rates,
    split_parameters,
)

RATES = {"matrix_lr": 1.0, "embedding_lr": 2.0, "head_lr": 3.0, "vector_lr": 4.0, "table_lr": 5.0}


class Model(nn.Module):
    def __init__(self, *, tied=False, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.peer = PEER(8, 25, num_heads=2, experts_per_head=3, query_dim=4, sparse=sparse)
        self.dense = DenseFFN(8)
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_one_kind(tied):
    model = Model(tied=tied)
    kinds = split_parameters(model)
    assert set(kinds.tables) == {"peer.experts"}
    assert set(kinds.embedding) == {"embedding.weight"}
    assert set(kinds.head) == (set() if tied else {"head.weight"})
    assert set(kinds.matrices) == {
        "peer.router.query.weight",
        "peer.router.sub_keys",
        "dense.up.weight",
        "dense.down.weight",
    }
    assert set(kinds.vectors) == {"norm.weight", "peer.router.norm.weight", "peer.router.norm.bias"}
    names = [name for kind in vars(kinds).values() for name in kind]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_frozen_parameters_are_left_out():
    model = Model()
    model.dense.up.weight.requires_grad_(False)
    assert "dense.up.weight" not in split_parameters(model).matrices


@pytest.mark.parametrize("sparse", [False, True])
def test_groups_carry_rates_betas_and_decay(sparse):
    optimizers = build_optimizers(Model(sparse=sparse), sparse_tables=sparse, weight_decay=0.1, **RATES)
    groups = {group["name"]: (group, optimizer) for optimizer in optimizers for group in optimizer.param_groups}
    assert {name: group["lr"] for name, (group, _) in groups.items()} == {
        "matrices": 1.0, "embedding": 2.0, "head": 3.0, "vectors": 4.0, "tables": 5.0
    }  # fmt: skip
    assert isinstance(groups["tables"][1], RowSparseAdam if sparse else torch.optim.AdamW)
    assert groups["tables"][0]["betas"] == (0.9, 0.99)
    assert groups["matrices"][0]["betas"] == (0.9, 0.95)
    decay = {name: group.get("weight_decay", 0.0) for name, (group, _) in groups.items()}
    assert decay == {"matrices": 0.1, "embedding": 0.0, "head": 0.0, "vectors": 0.0, "tables": 0.0}
    scale_learning_rates(optimizers, 0.5)
    scale_learning_rates(optimizers, 0.25)  # of the peak, not of what it was
    assert {name: group["lr"] for name, (group, _) in groups.items()}["tables"] == 1.25


def test_a_step_moves_every_parameter():
    torch.manual_seed(0)
    model = Model(sparse=True)
    optimizers = build_optimizers(model, sparse_tables=True, **dict.fromkeys(RATES, 0.01))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = model.embedding(torch.arange(10))
    x = x + model.peer(x)
    model.head(model.norm(x + model.dense(x))).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_expected_touched_share():
    assert expected_touched_share(0, 16, 100) == 0
    assert expected_touched_share(1, 1, 100) == pytest.approx(0.01)
    assert expected_touched_share(3, 2, 4) == pytest.approx(1 - 0.75**6)
    # (1 - 1/N)^n = 1 - n/N + ... : exact to the last digits where a naive power has none left
    assert expected_touched_share(1, 1, 2**60) == pytest.approx(2.0**-60, rel=1e-12)
    assert expected_touched_share(2**20, 128, 2**20) == pytest.approx(1 - math.exp(-128))
    generator = torch.Generator().manual_seed(0)
    counted = len(torch.randint(1000, (500,), generator=generator).unique()) / 1000
    assert expected_touched_share(100, 5, 1000) == pytest.approx(counted, abs=0.03)
    with pytest.raises(InputError, match="num_experts must be at least 1, got 0"):
        expected_touched_share(1, 1, 0)


@pytest.mark.parametrize("sparse", [False, True])
def test_betas_and_eps_reach_every_group(sparse):
    options = {"betas": (0.5, 0.6), "table_betas": (0.7, 0.8), "eps": 1e-3}
    optimizers = build_optimizers(Model(sparse=sparse), sparse_tables=sparse, **RATES, **options)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["eps"] == 1e-3
            assert group["betas"] == ((0.7, 0.8) if group["name"] == "tables" else (0.5, 0.6))
