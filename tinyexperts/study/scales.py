"""The sizes at which the studies can be run: minute (tests), laptop (two cores), gpu (one of 80 GB), paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tinyexperts.errors import InputError
from tinyexperts.model import (
    DenseConfig,
    ExpertChoiceMoEConfig,
    PEERConfig,
    ProductKeyMemoryConfig,
    TransformerConfig,
)
from tinyexperts.model.config import ExpertLayerConfig
from tinyexperts.training.config import TrainConfig

ScaleName = Literal["minute", "laptop", "gpu", "paper"]
METHODS = ("dense", "moe", "pkm", "peer")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and budgets of a scale.

    widths: model widths D by budget (training FLOPs of a run, router counted), both ascending: the best width grows
        with the budget, and the grid moves with it; heads are of `head_dim`
    last_budget: a larger one, for each method's best width at the largest of `budgets` alone; None: there is none
    seeds: of every point of the isoFLOP study; the ablations take them too
    layers: the sparse layer of each method
    base: what all runs share; its model's width and sparse layer, its budget and seed are replaced
    experts, active: values of N, and of (heads, experts a head), for the ablations
    peer_settings: of the ablations' runs, which are all of PEER: what the tuning of the isoFLOP study chose for it
    """

    name: ScaleName
    widths: Mapping[float, tuple[int, ...]]
    head_dim: int
    seeds: tuple[int, ...]
    layers: Mapping[str, ExpertLayerConfig]
    base: TrainConfig
    experts: tuple[int, ...]
    active: tuple[tuple[int, int], ...]
    last_budget: float | None = None
    peer_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(self.widths)

    @property
    def middle_width(self) -> int:
        """Of all widths: the one of tuning and of the ablations."""
        every = sorted(set().union(*self.widths.values()))
        return every[len(every) // 2]

    def config(self, layer: ExpertLayerConfig, *, width: int, budget: float, seed: int, **changes: Any) -> TrainConfig:
        """A run of this scale; changes are settings of TrainConfig."""
        model = replace(self.base.model, d_model=width, num_heads=width // self.head_dim, expert_layer=layer)
        return replace(self.base, **{"model": model, "training_flops": budget, "seed": seed, **changes})


def scale_named(name: ScaleName, *, data: Path, vocab_size: int) -> Scale:
    """The sizes of a scale, for a data set and its vocabulary.

    Raises:
        InputError: an unknown name.
    """
    if name not in get_args(ScaleName):
        raise InputError(f"the scale must be one of {', '.join(get_args(ScaleName))}, got {name!r}")
    return {"minute": _minute, "laptop": _laptop, "gpu": _gpu, "paper": _paper}[name](data, vocab_size)


def _base(
    data: Path, vocab_size: int, *, context_length: int, num_layers: int, activation: str, **settings: Any
) -> TrainConfig:
    model = TransformerConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=64,
        num_layers=num_layers,
        num_heads=1,
        dense=DenseConfig(activation=activation),  # type: ignore[arg-type]
        expert_layer=DenseConfig(),
    )
    return TrainConfig(run=Path(), data=data, model=model, training_flops=1.0, **settings)


def _layers(num_experts: int, heads: int, query_dim: int, moe_experts: int, activation: str) -> dict[str, Any]:
    """The paper's proportions: a memory retrieves twice as many values as PEER retrieves experts."""
    shared: dict[str, Any] = {"num_heads": heads, "query_dim": query_dim}
    return {
        "dense": DenseConfig(activation=activation),  # type: ignore[arg-type]
        "moe": ExpertChoiceMoEConfig(num_experts=moe_experts, activation=activation),  # type: ignore[arg-type]
        "pkm": ProductKeyMemoryConfig(num_values=num_experts, experts_per_head=32, **shared),
        "peer": PEERConfig(num_experts=num_experts, experts_per_head=16, **shared),
    }


def _minute(data: Path, vocab_size: int) -> Scale:
    """A few steps a run: that everything works, and nothing about the question."""
    base = _base(
        data, vocab_size, context_length=32, num_layers=2, activation="relu2",
        batch_size=2, threads=1, validation_every=50, validation_tokens=256,
    )  # fmt: skip
    layers = _layers(32**2, 1, 8, 4, "relu2")
    return Scale(
        name="minute",
        widths={1e8: (8, 16, 24), 2e8: (8, 16, 24)},
        last_budget=3e8,
        head_dim=8,
        seeds=(0, 1),
        layers=layers,
        base=base,
        experts=(16**2, 32**2),
        active=((1, 8), (1, 16)),
    )


def _laptop(data: Path, vocab_size: int) -> Scale:
    """Two cores and some hours; 5e10 training FLOPs a second a core."""
    base = _base(
        data, vocab_size, context_length=256, num_layers=4, activation="relu2",
        batch_size=4, threads=1, validation_every=200, validation_tokens=8192, checkpoint_every=250,
    )  # fmt: skip
    return Scale(
        name="laptop",
        widths={3e12: (32, 48, 64), 1e13: (32, 48, 64, 96), 3e13: (48, 64, 96)},
        last_budget=1e14,
        head_dim=16,
        seeds=(0, 1, 2),
        layers=_layers(256**2, 4, 32, 16, "relu2"),
        base=base,
        experts=(64**2, 128**2, 256**2, 512**2),
        active=((2, 16), (4, 16), (8, 16), (8, 32), (16, 32)),
        peer_settings={
            "batch_size": 2,
            "matrix_learning_rate": 2e-3,
            "embedding_learning_rate": 0.384,
            "head_learning_rate": 0.032,
            "table_learning_rate": 5e-3,
        },
    )


def _gpu(data: Path, vocab_size: int) -> Scale:
    """One GPU of 80 GB: 137,000 steps in 148 runs at a vocabulary of 4,096. Nothing of it has been run.

    19 minutes, two runs at a time, if a step takes 10 ms and a run 6 s to start, which is assumed.
    """
    base = _base(
        data, vocab_size, context_length=512, num_layers=8, activation="relu2",
        batch_size=32, validation_every=200, validation_tokens=65536, checkpoint_every=250,
    )  # fmt: skip
    return Scale(
        name="gpu",
        widths={1e14: (64, 96, 128), 3e14: (96, 128, 192), 1e15: (128, 192, 256)},
        head_dim=32,
        seeds=(0, 1, 2),
        layers=_layers(512**2, 8, 64, 32, "relu2"),
        base=base,
        experts=(128**2, 256**2, 512**2, 1024**2),
        active=((4, 8), (8, 8), (8, 16), (16, 16), (16, 32)),
    )


def _paper(data: Path, vocab_size: int) -> Scale:
    """The paper's own settings: 12 blocks of which the middle one is replaced, 128 sequences of 2,048 tokens.

    What the paper leaves open (optimiser, learning rates, widths, query width, activation) is ours, and so is a
    micro-batch of 4 sequences, of which query normalisation and expert choice see no others: with it all runs but
    those of PEER at the last width fit one GPU of 80 GB.
    """
    base = _base(
        data, vocab_size, context_length=2048, num_layers=12, activation="gelu",
        batch_size=4, gradient_accumulation=32, matrix_learning_rate=2e-3, embedding_learning_rate=2e-2,
        head_learning_rate=2e-3, table_learning_rate=1e-3, weight_decay=0.1, schedule="cosine",
        table_gradients="dense", validation_every=500, validation_tokens=2**20, checkpoint_every=500,
    )  # fmt: skip
    return Scale(
        name="paper",
        widths={6e18: (512, 640, 768, 1024, 1280), 2e19: (640, 768, 1024, 1280, 1536)},
        head_dim=64,
        seeds=(0, 1, 2),
        layers=_layers(1024**2, 8, 128, 128, "gelu"),
        base=base,
        experts=(128**2, 256**2, 512**2, 1024**2),
        active=((4, 8), (8, 8), (8, 16), (16, 16), (16, 32)),
    )
