"""PEER in a decoder of x-transformers: it learns facts by heart, and generates with x-transformers' own cache.

python examples/x_transformers_decoder.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.x_transformers import FeedForward

from tinyexperts import PEER
from tinyexperts.optim import build_optimizers, clip_gradient_norm_, deferred_gradients, scale_learning_rates

FACTS, LETTERS, NAME, VALUE = 512, 26, 4, 6


class Learned(NamedTuple):
    """What came out."""

    model: TransformerWrapper
    loss_before: float
    """The loss of a letter of a value, nats."""
    loss_after: float
    recall: float
    """The share of names after which the model writes the whole value."""
    written: Tensor
    """What it writes after each name (int64, [FACTS, VALUE])."""
    written_without_cache: Tensor


class PEERFeedForward(PEER):
    """PEER with the arguments that x-transformers gives to a feed-forward layer."""

    def forward(self, x: Tensor, deep_embed: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if deep_embed is None else y * deep_embed  # as x-transformers' own layer does


def replace_middle_feed_forward(decoder: Decoder, layer: nn.Module) -> None:
    places = [name for name, module in decoder.named_modules() if isinstance(module, FeedForward)]
    decoder.set_submodule(places[len(places) // 2], layer)


def main(steps: int = 200) -> Learned:
    """Train a decoder of three blocks on random names with random values."""
    torch.manual_seed(0)
    facts = torch.randint(LETTERS, (FACTS, NAME + VALUE))
    decoder = Decoder(dim=64, depth=3, heads=2, attn_dim_head=32, rotary_pos_emb=True, rotary_emb_dim=32)
    layer = PEERFeedForward(64, num_experts=64**2, num_heads=4, experts_per_head=8, query_dim=32, sparse=True)
    replace_middle_feed_forward(decoder, layer)
    model = TransformerWrapper(num_tokens=LETTERS, max_seq_len=NAME + VALUE, attn_layers=decoder, use_abs_pos_emb=False)
    # One AdamW for x-transformers' parameters, and for the table an Adam that updates the rows that were retrieved.
    rates = {"matrix_lr": 3e-3, "embedding_lr": 1e-2, "head_lr": 3e-3, "vector_lr": 3e-3, "table_lr": 1e-2}
    optimizers = build_optimizers(model, sparse_tables=True, **rates)

    def loss_of(texts: Tensor) -> Tensor:
        logits = model(texts[:, :-1])[:, NAME - 1 :]  # nobody can know the letters of a name
        return nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, NAME:].flatten())

    def loss_of_all() -> float:
        model.eval()
        with torch.no_grad():
            loss = loss_of(facts).item()
        model.train()
        return loss

    loss_before = loss_of_all()
    for step in range(steps):
        scale_learning_rates(optimizers, 1 - step / steps)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(facts[torch.randperm(FACTS)[:128]])
        with deferred_gradients(optimizers):
            loss.backward()
        clip_gradient_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    names, values = facts.split([NAME, VALUE], dim=1)
    writer = AutoregressiveWrapper(model)
    written = writer.generate(names, VALUE, temperature=0)
    learned = Learned(
        model=model,
        loss_before=loss_before,
        loss_after=loss_of_all(),
        recall=(written == values).all(1).float().mean().item(),
        written=written,
        written_without_cache=writer.generate(names, VALUE, temperature=0, cache_kv=False),
    )
    print(f"loss of a letter: {loss_before:.3f} nats before, {learned.loss_after:.3f} after")
    print(f"{learned.recall:.0%} of {FACTS} values are written by heart")
    return learned


if __name__ == "__main__":
    main()
