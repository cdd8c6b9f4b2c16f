"""Whole models: the losses of a device against the CPU's, and a language model with PEER against its dense twin."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gpu_check_parts.session import Session, Unit
from tinyexperts.layers import DenseConfig, PEERConfig
from tinyexperts.model import Transformer, TransformerConfig
from tinyexperts.optim import build_optimizers, clip_gradient_norm_, deferred_gradients

_STEPS, _LARGEST_DIFFERENCE = 50, 1e-4


def units(session: Session) -> list[Unit]:
    """Return both comparisons; there are none where nothing runs."""
    if session.mode != "gpu":
        return []
    return [Unit(_LOSSES, _losses_as_on_the_cpu), Unit("language model of 12 blocks, bf16", _language_models)]


_LOSSES = f"losses of {_STEPS} steps, against the CPU's"


def _optimizers(model: Transformer) -> list[Optimizer]:
    return build_optimizers(
        model, sparse_tables=True, matrix_lr=1e-3, embedding_lr=1e-3, head_lr=1e-3, vector_lr=1e-3, table_lr=1e-3
    )


def _step(model: Transformer, optimizers: list[Optimizer], tokens: Tensor) -> Tensor:
    """Take a training step on sequences [B, T + 1]; returns the loss before it."""
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    with deferred_gradients(optimizers):
        loss.backward()  # type: ignore[no-untyped-call]
    clip_gradient_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def _losses_as_on_the_cpu(session: Session) -> dict[str, Any]:
    return _losses(session, ("cpu", "cuda"))


def _losses(session: Session, devices: tuple[str, str]) -> dict[str, Any]:
    """Compare the losses of the same training on two devices."""
    config = TransformerConfig(
        vocab_size=512,
        context_length=64,
        d_model=64,
        num_layers=3,
        num_heads=4,
        expert_layer=PEERConfig(num_experts=4096, num_heads=4, experts_per_head=8, query_dim=32),
    )
    # Text with something to learn: each token is followed by one of two.
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (_STEPS, 8, 1), generator=draw)
    for _ in range(64):
        following = (3 * tokens[..., -1:] + torch.randint(2, tokens[..., -1:].shape, generator=draw)) % 512
        tokens = torch.cat([tokens, following], -1)
    losses = []
    for device in devices:
        torch.manual_seed(0)
        model = Transformer(config, sparse_tables=True).to(device)
        optimizers = _optimizers(model)
        losses.append([float(_step(model, optimizers, batch.to(device))) for batch in tokens])
    differences = [abs(a - b) for a, b in zip(*losses, strict=True)]
    if not max(differences) <= _LARGEST_DIFFERENCE:
        session.wrong.append(_LOSSES)
    return {
        "first and last loss": (losses[0][0], losses[0][-1]),
        "largest difference": max(differences),
        "goal": _LARGEST_DIFFERENCE,
    }


def _language_models(session: Session) -> dict[str, Any]:
    """Train on random tokens: the time and the memory of steps are those of any text."""
    layers = {
        "PEER of 2^20 experts in the middle": PEERConfig(),
        "dense": DenseConfig(),
    }
    found: dict[str, Any] = {}
    tokens = torch.randint(32768, (16, 1025), device=session.device)
    for name, layer in layers.items():
        config = TransformerConfig(
            vocab_size=32768, context_length=1024, d_model=768, num_layers=12, num_heads=12, expert_layer=layer
        )
        model = Transformer(config, sparse_tables=True).to(session.device)
        optimizers = _optimizers(model)

        def step(model: Transformer = model, optimizers: list[Optimizer] = optimizers) -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                _step(model, optimizers, tokens)

        for _ in range(3):
            step()
        torch.cuda.synchronize()
        started = time.monotonic()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        seconds = (time.monotonic() - started) / 10
        found[name] = {
            "tokens a second": round(tokens[:, 1:].numel() / seconds),
            "step, ms": round(1e3 * seconds, 2),
            "peak, GiB": round(session.peak_gib(step), 2),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        del model, optimizers, step
        gc.collect()
        torch.cuda.empty_cache()
    return found
