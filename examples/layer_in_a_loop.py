"""PEER in a plain PyTorch loop: it learns a function that a table of experts can store.

python examples/layer_in_a_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

from tinyexperts import PEER
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients

KEYS, WIDTH = 512, 64


def main(steps: int = 100) -> float:
    """Train a layer to answer with each key's own value; return the share of keys that it gets right."""
    torch.manual_seed(0)
    keys = torch.randn(KEYS, WIDTH)
    values = torch.randint(0, 10, (KEYS,))
    layer = PEER(WIDTH, num_experts=64**2, num_heads=4, experts_per_head=8, query_dim=32, sparse=True)
    head = nn.Linear(WIDTH, 10)
    rest = [p for p in (*layer.parameters(), *head.parameters()) if p is not layer.experts]
    # Rows that no token retrieved cost nothing: neither memory for a gradient nor time in the step.
    optimizers = [torch.optim.AdamW(rest, lr=3e-3), RowSparseAdam([layer.experts], lr=1e-2, fused=True)]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(layer(keys)), values)
        with deferred_gradients(optimizers):
            loss.backward()
        clip_gradient_norm_([*layer.parameters(), *head.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    layer.eval()
    right = (head(layer(keys)).argmax(-1) == values).float().mean().item()
    print(f"{right:.0%} of {KEYS} keys are answered right; a guess gives 10 %")
    return right


if __name__ == "__main__":
    main()
