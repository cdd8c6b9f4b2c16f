"""The sizes at which the studies can be run: minute (tests), laptop (two cores), gpu (one of 80 GB), paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tinyexperts.comparison.methods import METHODS, LayerSizes
from tinyexperts.errors import InputError
from tinyexperts.layers import DenseConfig
from tinyexperts.model import ExpertLayerConfig, TransformerConfig
from tinyexperts.ops.activation import Activation
from tinyexperts.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    Remember,
    ScheduleConfig,
    TrainConfig,
    with_settings,
)

ScaleName = Literal["minute", "laptop", "gpu", "paper"]

# Training FLOPs an entity with which models of some 200,000 active parameters begin to know its facts: at 2.5e12 they
# know some of 1,000 airports, and nothing of 4,000.
_TELLING_FLOPS_PER_ENTITY = 2.5e9


@dataclass(frozen=True, kw_only=True)
class TeachingSizes:
    """The sizes of the rounds in which new facts are taught."""

    num_entities: int = 150
    """Entities of a round."""
    passes: int = 16
    """Times to go over them, at most."""
    sample_tokens: int = 131072
    """Tokens of own samples of the base model; later models write a quarter of them."""
    rows: int = 1000
    """Rows that a step trains where they are chosen by TF-IDF."""
    num_rounds: int = 5
    """Rounds that are taught one after the other."""
    remember: tuple[Remember, ...] = get_args(Remember)
    """What is remembered by, each compared."""
    experts: tuple[int, ...] = (64**2, 512**2)
    """Further numbers of experts of PEER, whose tables are taught."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The sizes and budgets of a scale."""

    name: ScaleName
    widths: Mapping[float, tuple[int, ...]]
    """Model widths D by budget (training FLOPs of a run, router counted), both ascending: the best width grows with the
    budget, and the grid moves with it."""
    head_dim: int
    """The width of an attention head."""
    seeds: tuple[int, ...]
    """The seeds of every point of a grid."""
    layers: Mapping[str, ExpertLayerConfig]
    """The expert layer of each method."""
    base: TrainConfig
    """The settings that all runs share; its width, expert layer, budget and seed are replaced."""
    experts: tuple[int, ...]
    """Values of N for the ablations."""
    active: tuple[tuple[int, int], ...]
    """Values of (heads, experts a head) for the ablations."""
    last_budget: float | None = None
    """A larger budget, for each method's best width at the largest of `budgets` alone; None: there is none."""
    telling_budget: float | None = None
    """The smallest of `budgets` at which settings can show what they do; None: the smallest of all."""
    peer_settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings that the isoFLOP study's tuning chose for PEER, by dotted names; the ablations take them."""
    peer_width: int | None = None
    """The model width D of the ablations; None: the middle one."""
    num_entities: Mapping[Path, int] = field(default_factory=dict)
    """Of data sets of facts that are compared, the number of entities; empty: one data set, that of `base`."""

    method_widths: Mapping[str, int] = field(default_factory=dict)
    """The model width D of a method where none is searched; those that are missing take the middle one."""
    teaching: TeachingSizes = field(default_factory=TeachingSizes)
    """The sizes of the rounds in which new facts are taught."""
    rounds: tuple[Path, ...] = ()
    """Data sets of new facts that are taught one after the other; the first is to tune on."""
    runs: Path = field(default_factory=Path)
    """The folder of a study's runs, for those that begin with another."""

    @property
    def budgets(self) -> tuple[float, ...]:
        """The training FLOPs of a run, ascending."""
        return tuple(self.widths)

    @property
    def tuning_budget(self) -> float:
        """The budget of the tuning, and of the ablations at one budget."""
        return self.telling_budget or self.budgets[0]

    @property
    def middle_width(self) -> int:
        """The middle one of all widths, for tuning and the ablations."""
        every = sorted(set().union(*self.widths.values()))
        return every[len(every) // 2]

    def config(self, layer: ExpertLayerConfig, *, width: int, budget: float, seed: int, **changes: Any) -> TrainConfig:
        """Return the configuration of a run at this scale.

        Args:
            layer (ExpertLayerConfig): the expert layer.
            width (int): the model width D.
            budget (float): training FLOPs.
            seed (int): the seed.
            changes (Any): settings of TrainConfig, by their dotted names.
        """
        settings = {
            "model.d_model": width,
            "model.num_heads": width // self.head_dim,
            "model.expert_layer": layer,
            "training_flops": budget,
            "seed": seed,
        }
        return with_settings(self.base, settings | changes)


def scale_named(name: ScaleName, *, data: Path, vocab_size: int) -> Scale:
    """Return the sizes of a scale.

    Args:
        name (ScaleName): minute, laptop, gpu or paper.
        data (Path): the data set of all runs.
        vocab_size (int): the size of its vocabulary.

    Raises:
        InputError: an unknown name.
    """
    if name not in get_args(ScaleName):
        raise InputError(f"the scale must be one of {', '.join(get_args(ScaleName))}, got {name!r}")
    return {"minute": _minute, "laptop": _laptop, "gpu": _gpu, "paper": _paper}[name](data, vocab_size)


def on_facts(scale: Scale, num_entities: int) -> Scale:
    """Return a scale for data sets of facts: statements are short, and small models store what a table does not.

    Args:
        scale (Scale): the scale for text.
        num_entities (int): the entities of the data set; the more there are, the larger is the budget of the tuning.
    """
    if scale.name != "laptop":
        return scale
    budgets = (2.5e12, 1e13, 3e13)
    is_telling = (budget for budget in budgets if budget >= _TELLING_FLOPS_PER_ENTITY * num_entities)
    return replace(
        scale,
        base=with_settings(scale.base, {"model.context_length": 128, "batch_size": 8}),
        widths=dict.fromkeys(budgets, (16, 32, 48, 64, 96)),
        experts=(*scale.experts, 1024**2),
        telling_budget=next(is_telling, budgets[-1]),
        peer_settings={},
        peer_width=32,
        method_widths={"dense": 64, "moe": 64, "pkm": 32, "peer": 32},
    )


def _base(
    data: Path, vocab_size: int, *, context_length: int, num_layers: int, activation: Activation, **settings: Any
) -> TrainConfig:
    model = TransformerConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=64,
        num_layers=num_layers,
        num_heads=1,
        dense=DenseConfig(activation=activation),
        expert_layer=DenseConfig(),
    )
    return TrainConfig(run=Path(), data=data, model=model, training_flops=1.0, **settings)


def _layers(**sizes: Any) -> dict[str, ExpertLayerConfig]:
    return {method.name: method.layer(LayerSizes(**sizes)) for method in METHODS}


def _minute(data: Path, vocab_size: int) -> Scale:
    """Return sizes of a few steps a run: a check that everything works, and no answer to any question."""
    base = _base(
        data, vocab_size, context_length=32, num_layers=2, activation="relu2",
        batch_size=2, threads=1, validation_every=50, validation_tokens=256,
    )  # fmt: skip
    return Scale(
        name="minute",
        widths={1e8: (8, 16, 24), 2e8: (8, 16, 24)},
        last_budget=3e8,
        head_dim=8,
        seeds=(0, 1),
        layers=_layers(num_experts=32**2, num_heads=1, query_dim=8, num_mixture_experts=4, activation="relu2"),
        base=base,
        experts=(16**2, 32**2),
        active=((1, 8), (1, 16)),
        teaching=TeachingSizes(
            num_entities=8,
            passes=2,
            sample_tokens=2048,
            rows=50,
            num_rounds=2,
            remember=("own-samples", "data"),
            experts=(16**2,),
        ),
    )


def _laptop(data: Path, vocab_size: int) -> Scale:
    """Return sizes for two cores and some hours, at 5e10 training FLOPs a second a core."""
    base = _base(
        data, vocab_size, context_length=256, num_layers=4, activation="relu2",
        batch_size=4, threads=1, validation_every=200, validation_tokens=8192, checkpoint=CheckpointConfig(every=250),
    )  # fmt: skip
    return Scale(
        name="laptop",
        widths={3e12: (32, 48, 64), 1e13: (32, 48, 64, 96), 3e13: (48, 64, 96)},
        last_budget=1e14,
        head_dim=16,
        seeds=(0, 1, 2),
        layers=_layers(num_experts=256**2, num_heads=4, query_dim=32, num_mixture_experts=16, activation="relu2"),
        base=base,
        experts=(64**2, 128**2, 256**2, 512**2),
        active=((2, 16), (4, 16), (8, 16), (8, 32), (16, 32)),
        peer_settings={
            "batch_size": 2,
            "optimizer.matrix_learning_rate": 2e-3,
            "optimizer.embedding_learning_rate": 0.384,
            "optimizer.head_learning_rate": 0.032,
            "optimizer.table_learning_rate": 5e-3,
        },
    )


def _gpu(data: Path, vocab_size: int) -> Scale:
    """Return sizes for one GPU of 80 GB: 137,000 steps in 148 runs at a vocabulary of 4,096. None has been run.

    19 minutes, two runs at a time, if a step takes 10 ms and a run 6 s to start, which is assumed.
    """
    base = _base(
        data, vocab_size, context_length=512, num_layers=8, activation="relu2",
        batch_size=32, validation_every=200, validation_tokens=65536, checkpoint=CheckpointConfig(every=250),
    )  # fmt: skip
    return Scale(
        name="gpu",
        widths={1e14: (64, 96, 128), 3e14: (96, 128, 192), 1e15: (128, 192, 256)},
        head_dim=32,
        seeds=(0, 1, 2),
        layers=_layers(num_experts=512**2, num_heads=8, query_dim=64, num_mixture_experts=32, activation="relu2"),
        base=base,
        experts=(128**2, 256**2, 512**2, 1024**2),
        active=((4, 8), (8, 8), (8, 16), (16, 16), (16, 32)),
    )


def _paper(data: Path, vocab_size: int) -> Scale:
    """Return the paper's own settings: 12 blocks, the middle one replaced, and 128 sequences of 2,048 tokens.

    What the paper leaves open (optimizer, learning rates, widths, query width, activation) is ours, and so is a
    micro-batch of 4 sequences, beyond which query normalization and expert choice see no tokens: with it all runs but
    those of PEER at the last width fit one GPU of 80 GB.
    """
    base = _base(
        data, vocab_size, context_length=2048, num_layers=12, activation="gelu",
        batch_size=4, gradient_accumulation=32, validation_every=500, validation_tokens=2**20,
        optimizer=OptimizerConfig(
            matrix_learning_rate=2e-3, embedding_learning_rate=2e-2, head_learning_rate=2e-3, table_learning_rate=1e-3,
            weight_decay=0.1, table_gradients="dense",
        ),
        schedule=ScheduleConfig(shape="cosine"),
    )  # fmt: skip
    return Scale(
        name="paper",
        widths={6e18: (512, 640, 768, 1024, 1280), 2e19: (640, 768, 1024, 1280, 1536)},
        head_dim=64,
        seeds=(0, 1, 2),
        layers=_layers(num_experts=1024**2, num_heads=8, query_dim=128, num_mixture_experts=128, activation="gelu"),
        base=base,
        experts=(128**2, 256**2, 512**2, 1024**2),
        active=((4, 8), (8, 8), (8, 16), (16, 16), (16, 32)),
    )
