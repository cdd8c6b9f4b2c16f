"""Times of a forward pass and a training step: each layer of theirs in turns with ours of the same weights.

Equal outputs and gradients come first. A forward pass keeps no gradients; a step is forward pass, backward pass and
update. Theirs trains by fused AdamW with dense gradients, and by SparseAdam for the tables; ours by RowSparseAdam.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from peer_package_parts.layers import Sizes
from peer_package_parts.pairs import (
    DENSE,
    THEIRS,
    check_equal,
    dense_of_equal_flops,
    foreign,
    ours_of,
    settle,
    with_adam,
    with_sparse_adam,
)
from tinyexperts.bench.contestants import Contestant
from tinyexperts.bench.inputs import Inputs
from tinyexperts.bench.timing import Spread, interleaved, timed


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """The sizes that are timed."""

    d_model: int = 256
    num_experts: tuple[int, ...] = (2**14, 2**18)
    num_tokens: tuple[int, ...] = (1, 64, 1024)
    num_heads: int = 8
    experts_per_head: int = 16
    query_dim: int = 128
    repeats: int = 7

    def sizes(self, num_experts: int) -> Sizes:
        """Return the sizes of a layer."""
        return Sizes(
            d_model=self.d_model,
            num_experts=num_experts,
            num_heads=self.num_heads,
            experts_per_head=self.experts_per_head,
            query_dim=self.query_dim,
        )


def measure(config: SpeedConfig, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time each layer at each size; ratios are its time over ours, round by round."""
    results = []
    for num_experts in config.num_experts:
        for name, make in THEIRS.items():
            torch.manual_seed(0)
            theirs = make(config.sizes(num_experts))
            ours = ours_of(theirs)
            layer = foreign(theirs, ours)
            show(f"speed: N = {num_experts:,}, {name}")
            check_equal(layer, ours.module, _inputs(config, 64, trains=False).next())
            rivals: dict[str, Callable[[], Contestant]] = {
                f"{name}; AdamW": lambda layer=layer: with_adam(layer),
                f"{name}; SparseAdam": lambda layer=layer: with_sparse_adam(layer),
            }
            if name == next(iter(THEIRS)):
                rivals[DENSE] = lambda ours=ours: with_adam(dense_of_equal_flops(ours, config.d_model))
            for label, rival in rivals.items():
                contestant = rival()
                for num_tokens in config.num_tokens:
                    times = _times(config, num_tokens, ours, contestant)
                    results.append({"layer": label, "num_experts": num_experts, "num_tokens": num_tokens, **times})
            del theirs, ours, layer, rivals, contestant
            gc.collect()
    return results


def _inputs(config: SpeedConfig, num_tokens: int, *, trains: bool) -> Inputs:
    return Inputs(num_tokens, config.d_model, trains=trains, generator=torch.Generator().manual_seed(num_tokens))


def _times(config: SpeedConfig, num_tokens: int, ours: Contestant, theirs: Contestant) -> dict[str, Any]:
    pair = {"ours": ours, "theirs": theirs}
    inputs = _inputs(config, num_tokens, trains=False)
    with torch.no_grad():
        forward = interleaved({name: timed(each.forward_of(inputs)) for name, each in pair.items()}, config.repeats)
    inputs = _inputs(config, num_tokens, trains=True)
    for each in pair.values():
        settle(each, inputs.next(), inputs.grad_y_MD)
    step = interleaved({name: each.step_of(inputs) for name, each in pair.items()}, config.repeats)
    found = {}
    for kind, times in (("forward", forward), ("step", step)):
        seconds: dict[str, np.ndarray] = {name: rounds.sum(1) for name, rounds in times.items()}
        found[kind] = {
            "our_seconds": asdict(Spread.of(seconds["ours"])),
            "seconds": asdict(Spread.of(seconds["theirs"])),
            "ratio": asdict(Spread.of(seconds["theirs"] / seconds["ours"])),
        }
    return found
