"""Fixtures of the explorer: a data set of facts, untrained models, and one that knows some of the facts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyexperts.data import PrepareConfig, TokenDataset, prepare
from tinyexperts.layers import PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import Transformer, TransformerConfig

SIZES = {"num_experts": 64, "num_heads": 2, "experts_per_head": 3, "query_dim": 6}
LAYERS = {
    "pkm": ProductKeyMemoryConfig(**SIZES),
    "peer": PEERConfig(**SIZES),
    "gated": PEERConfig(**SIZES, gated=True),
}


def make_untrained(kind: str, **options: object) -> Transformer:
    torch.manual_seed(0)
    settings = {"vocab_size": 320, "context_length": 64, "d_model": 16, "num_layers": 2, "num_heads": 2}
    model = Transformer(TransformerConfig(**(settings | {"expert_layer": LAYERS[kind]} | options)))
    with torch.no_grad():
        model.head.weight.normal_()  # it starts at zero, and all answers would be alike
        model.norm.weight.uniform_(0.5, 2)
        for block in model.config.blocks_with_experts:
            model.blocks[block].feed_forward.experts[:, -1].mul_(8)
    return model.eval()


@pytest.fixture(scope="session")
def make_model():
    """A function that makes an untrained model whose head says something, with other settings."""
    return make_untrained


@pytest.fixture(scope="session")
def facts(tmp_path_factory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("facts")
    rows = [f"k{number},{'yes' if number % 4 else 'no'},{number % 3}" for number in range(40)]
    (folder / "t.csv").write_text("\n".join(["name,open,floor", *rows]) + "\n")
    prepare(PrepareConfig(facts=folder / "t.csv", key="name", output=folder / "data", vocab_size=320, seed=1))
    return TokenDataset.open(folder / "data")


@pytest.fixture(scope="session")
def models() -> dict[str, Transformer]:
    """Untrained models; the gated one has two layers with experts."""
    return {kind: make_untrained(kind, expert_blocks=(0, 1) if kind == "gated" else None) for kind in LAYERS}


@pytest.fixture(scope="session")
def trained(facts) -> Transformer:
    """A model that knows some of the facts: sixty steps on a statement a row."""
    split, model = facts.split("train"), make_untrained("peer")
    rows = [torch.from_numpy(np.concatenate([[split.end_of_text_id], split.document(n)])) for n in range(120)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=split.end_of_text_id)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    return model.eval()
