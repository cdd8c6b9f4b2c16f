"""Recipes: functions that return a full configuration, one for each kind of expert layer, and one for a GPU.

The first four share the size and the learning rates that a first look at tiny scale settled on two CPU cores: D = 64, 4
blocks, the third with the expert layer; a vocabulary of 4,096; ReLU^2 in the dense layers. A run of 3.2e12 training
FLOPs takes one core a minute or two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tinyexperts.layers import DenseConfig, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import ExpertLayerConfig, TransformerConfig
from tinyexperts.training.config import OptimizerConfig, ScheduleConfig, TrainConfig

_DENSE = DenseConfig(activation="relu2")


def _tiny(name: str, expert_layer: ExpertLayerConfig) -> TrainConfig:
    model = TransformerConfig(
        vocab_size=4096,
        context_length=256,
        d_model=64,
        num_layers=4,
        num_heads=4,
        tied_embeddings=False,
        dense=_DENSE,
        expert_layer=expert_layer,
    )
    return TrainConfig(run=Path("runs", name), data=Path("data/stdlib"), model=model, training_flops=3.2e12)


def dense() -> TrainConfig:
    """Make a plain transformer, the twin that every expert layer is compared with."""
    return _tiny("dense", _DENSE)


def expert_choice_moe() -> TrainConfig:
    """Put 16 experts of the dense layer's size in the middle block, one a token on average (the paper: 128 experts)."""
    return _tiny("expert-choice-moe", ExpertChoiceMoEConfig(num_experts=16, activation="relu2"))


def product_key_memory() -> TrainConfig:
    """Put 65,536 values in the middle block, 4 heads x 32 a token (the paper: 1024^2 values, 8 x 32)."""
    return _tiny("product-key-memory", ProductKeyMemoryConfig(num_experts=256**2, num_heads=4, query_dim=32))


def peer() -> TrainConfig:
    """Put 65,536 single-neuron experts in the middle block, 4 heads x 16 a token (the paper: 1024^2, 8 x 16)."""
    return _tiny("peer", PEERConfig(num_experts=256**2, num_heads=4, experts_per_head=16, query_dim=32))


def gpu() -> TrainConfig:
    """Put the paper's 1024^2 experts in the middle one of 12 blocks of width 512, 8 heads x 16 a token, for one GPU.

    The dense part computes in bf16, as runs on GPUs do, and the table is kept in bf16, rounded stochastically. Sizes
    and learning rates are our choice; it has run on no GPU.
    """
    layer = PEERConfig(num_experts=1024**2, num_heads=8, experts_per_head=16, query_dim=128)
    model = TransformerConfig(
        vocab_size=4096,
        context_length=1024,
        d_model=512,
        num_layers=12,
        num_heads=8,
        tied_embeddings=False,
        dense=_DENSE,
        expert_layer=layer,
    )
    return TrainConfig(
        run=Path("runs/gpu"),
        data=Path("data/stdlib"),
        model=model,
        training_flops=3e15,
        batch_size=16,
        optimizer=OptimizerConfig(
            matrix_learning_rate=2e-3,
            embedding_learning_rate=2e-2,
            head_learning_rate=2e-3,
            table_learning_rate=1e-3,
            weight_decay=0.1,
            table_dtype="bf16",
        ),
        schedule=ScheduleConfig(shape="cosine"),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "peer": peer,
    "dense": dense,
    "expert-choice-moe": expert_choice_moe,
    "product-key-memory": product_key_memory,
    "gpu": gpu,
}
"""The recipes by the names that they have on the command line."""
