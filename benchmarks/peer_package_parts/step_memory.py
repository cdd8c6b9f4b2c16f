"""Memory of a training step: what is held between steps, what the forward pass keeps, and the peak of a step.

Peaks are those of the process as Linux counts them, so that the memory of kernels counts as well as that of tensors.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peer_package_parts.layers import Sizes
from peer_package_parts.pairs import (
    DENSE,
    THEIRS,
    dense_of_equal_flops,
    foreign,
    ours_of,
    settle,
    state_tensors,
    with_adam,
    with_sparse_adam,
)
from tinyexperts.bench import memory
from tinyexperts.bench.contestants import Contestant
from tinyexperts.bench.inputs import Inputs
from tinyexperts.optim import deferred_gradients


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The sizes that are measured."""

    d_model: int = 256
    num_experts: int = 2**18
    num_tokens: int = 1024
    num_heads: int = 8
    experts_per_head: int = 16
    query_dim: int = 128


def measure(config: MemoryConfig, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure each layer of theirs, ours of the same weights, and a dense layer."""
    results = []
    for label, contestant in _contestants(config):
        show(f"memory: {label}")
        results.append({"layer": label, **_memory_of(contestant, config)})
        del contestant  # before the next one is made
    return results


def _contestants(config: MemoryConfig) -> Iterator[tuple[str, Contestant]]:
    sizes = Sizes(
        d_model=config.d_model,
        num_experts=config.num_experts,
        num_heads=config.num_heads,
        experts_per_head=config.experts_per_head,
        query_dim=config.query_dim,
    )
    for name, make in THEIRS.items():
        for kind in ("ours", "AdamW", "SparseAdam"):
            torch.manual_seed(0)
            theirs = make(sizes)
            ours = ours_of(theirs)
            if kind == "ours":
                yield f"tinyexperts, as {name}", ours
                if name == next(iter(THEIRS)):
                    yield DENSE, with_adam(dense_of_equal_flops(ours, config.d_model))
            else:
                yield f"{name}; {kind}", (with_adam if kind == "AdamW" else with_sparse_adam)(foreign(theirs, ours))


def _memory_of(contestant: Contestant, config: MemoryConfig) -> dict[str, Any]:
    inputs = Inputs(config.num_tokens, config.d_model, trains=True, generator=torch.Generator().manual_seed(0))
    settle(contestant, inputs.next(), inputs.grad_y_MD)
    contestant.step(inputs.next(), inputs.grad_y_MD)
    parameters = list(contestant.module.parameters())
    activations = contestant.activation_bytes(inputs.next())
    return {
        "weights_bytes": _bytes(parameters),
        "state_bytes": _bytes(state_tensors(contestant)),
        "activation_bytes_per_token": activations / config.num_tokens,
        "peak_of_step_bytes": _peak_of(lambda: contestant.step(inputs.next(), inputs.grad_y_MD)),
        "table_gradient": _table_gradient(contestant, inputs),
    }


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak_of(call: Callable[[], object]) -> int:
    """Return the bytes that a call takes at most, in addition to what the process holds before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would not be seen when it is used again
    memory.restart_peak()
    before = _resident_bytes()
    call()
    peak = memory.peak_resident_bytes()
    assert peak is not None
    return peak - before


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def _table_gradient(contestant: Contestant, inputs: Inputs) -> str:
    """Say in which form the gradient of the largest parameter comes."""
    largest = max(contestant.module.parameters(), key=lambda parameter: parameter.numel())
    with deferred_gradients(contestant.optimizers):
        contestant.module(inputs.next()).backward(inputs.grad_y_MD)
        assert largest.grad is not None
        return "sparse" if largest.grad.is_sparse else "dense"
