"""What a model is made of, and what a pass through it holds, counted without its memory and without data.

Parameters are counted by their shapes; activations by running a forward and a backward pass on fake tensors.
"""

from __future__ import annotations

import functools
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyexperts.layers import ProductKeyLayer
from tinyexperts.model import Transformer, TransformerConfig
from tinyexperts.optim import expected_touched_share, split_parameters
from tinyexperts.training.device import autocast
from tinyexperts.training.distributed.sharding import sharded_dimension


@dataclass(frozen=True, kw_only=True)
class Table:
    """One product-key layer: N experts of E vectors of width D, of which a token retrieves P."""

    num_experts: int
    num_vectors: int
    width: int
    retrieved: int

    @property
    def numbers(self) -> int:
        return self.num_experts * self.num_vectors * self.width

    def touched_share(self, num_tokens: float) -> float:
        """Of the rows, that so many tokens are expected to touch."""
        return expected_touched_share(round(num_tokens), self.retrieved, self.num_experts)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What a model is made of: parameters of the blocks without tables, those outside of the blocks, tables."""

    blocks: list[list[torch.Size]]
    outside: list[torch.Size]
    tables: list[Table]
    forward_flops: int
    activation_bytes: float
    """Whatever the number of tokens: the weights in bf16, say."""
    activation_bytes_of_token: float

    def dense(self, num_ranks: int) -> int:
        """Numbers in all parameters but the tables, as FSDP2 lays them on so many ranks."""
        return self.of_blocks(num_ranks) + self.outside_of_blocks(num_ranks)

    def of_blocks(self, num_ranks: int) -> int:
        return sum(_numbers_on(block, num_ranks) for block in self.blocks)

    def outside_of_blocks(self, num_ranks: int) -> int:
        return _numbers_on(self.outside, num_ranks)

    def largest_block(self, num_ranks: int) -> int:
        return max(_numbers_on(block, num_ranks) for block in self.blocks)

    def touched(self, num_tokens: float) -> float:
        """Numbers in the rows of all tables that so many tokens are expected to touch."""
        return sum(table.numbers * table.touched_share(num_tokens) for table in self.tables)


def _numbers_on(shapes: list[torch.Size], num_ranks: int) -> int:
    """With the rows that FSDP2 adds to a parameter of which the ranks divide no dimension."""
    numbers = 0
    for shape in shapes:
        sharded = shape[sharded_dimension(shape, num_ranks)]
        numbers += math.prod(shape) // sharded * math.ceil(sharded / num_ranks) * num_ranks
    return numbers


@functools.lru_cache(maxsize=256)  # a pass on fake tensors takes seconds, and the runs of a study share their models
def count_sizes(config: TransformerConfig, device: torch.device, precision: str) -> ModelSizes:
    """Of a model that is trained in a precision on a kind of device, which need not be there."""
    with torch.device("meta"):
        model = Transformer(config)
    tables = set(split_parameters(model).tables.values())
    blocks = [[p for p in block.parameters() if p not in tables] for block in model.blocks]
    inside = tables.union(*blocks)
    # So many that activations rule: of few the peak is where all gradients are there.
    few, many = (_peak_bytes(config, device, precision, num_sequences) for num_sequences in (64, 128))
    return ModelSizes(
        blocks=[[parameter.shape for parameter in block] for block in blocks],
        outside=[parameter.shape for parameter in model.parameters() if parameter not in inside],
        tables=[
            Table(
                num_experts=len(layer.experts),
                num_vectors=layer.experts.shape[1],
                width=layer.experts.shape[2],
                retrieved=layer.retrieved_per_token,
            )
            for layer in model.modules()
            if isinstance(layer, ProductKeyLayer)
        ],
        forward_flops=model.flops_per_token(config.context_length),
        activation_bytes=2 * few - many,
        activation_bytes_of_token=(many - few) / (64 * config.context_length),
    )


def _peak_bytes(config: TransformerConfig, device: torch.device, precision: str, num_sequences: int) -> int:
    """The most that a forward and a backward pass hold at once, but for parameters and sparse gradients of tables."""
    # Tables' gradients have as many rows as the data makes them touch: a size that is a symbol here. The tensors are
    # those of a CPU, since torch makes none of a device that it was not built for.
    with FakeTensorMode(shape_env=ShapeEnv()):
        model = Transformer(config, sparse_tables=True)
        tokens = torch.zeros(num_sequences, config.context_length, dtype=torch.int64)
        with _LiveBytes() as live:
            with autocast(precision, torch.device("cpu")):
                if device.type == "cpu":
                    loss = model.loss(tokens, tokens)
                else:  # the logits are made whole
                    loss = F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
            loss.backward()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._now = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        if isinstance(size, int) and key not in self._sizes:
            self._sizes[key] = size
            self._now += size
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
