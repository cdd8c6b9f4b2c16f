"""The costs of a model and of a training run, counted by shapes, without memory and without data.

FLOPs are those of the matrix products, as everywhere in this package (layers/feed_forward.py). The paper doesn't say
whether it counted the router, so that every total can be had without it.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass

import torch

from tinyexperts.layers import ProductKeyLayer
from tinyexperts.layers.feed_forward import ParameterCount
from tinyexperts.model import Transformer, TransformerConfig
from tinyexperts.optim import expected_touched_share, split_parameters
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.distributed.sharding import sharded_dimension

_FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class FlopsByModule:
    """FLOPs a token of one forward pass."""

    attention: int
    dense_layers: int
    query_network: int
    """Query network of PEER and product-key memory; the router of a mixture of experts."""
    sub_key_scores: int
    experts: int
    """Arithmetic of the retrieved rows, or of the chosen dense experts."""
    head: int

    @property
    def router(self) -> int:
        """The FLOPs that choose experts."""
        return self.query_network + self.sub_key_scores

    @property
    def total(self) -> int:
        """The FLOPs of all modules."""
        return self.attention + self.dense_layers + self.router + self.experts + self.head


@dataclass(frozen=True, kw_only=True)
class TableSize:
    """One product-key layer: N experts of E vectors of width D, of which a token retrieves P."""

    num_experts: int
    num_vectors: int
    width: int
    retrieved: int

    row_bytes: int
    """Bytes of an expert, with the scales of a quantized table."""

    @property
    def numbers(self) -> int:
        """The number of elements."""
        return self.num_experts * self.num_vectors * self.width

    def touched_share(self, num_tokens: float) -> float:
        """Return the expected share of rows that num_tokens touch."""
        return expected_touched_share(round(num_tokens), self.retrieved, self.num_experts)


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """The parameters of a model and the FLOPs of one forward pass."""

    parameters: ParameterCount
    num_matmul: int
    """Parameters of matrix products: neither tables nor the embedding; a mixture's experts all count."""
    blocks: list[list[torch.Size]]
    """Shapes of the parameters of each block, without tables."""
    outside: list[torch.Size]
    """Shapes of the parameters outside of the blocks."""
    tables: list[TableSize]
    forward_flops: FlopsByModule

    def dense(self, num_ranks: int) -> int:
        """Count the numbers in all parameters but the tables, as FSDP2 lays them on num_ranks ranks."""
        return self.of_blocks(num_ranks) + self.outside_of_blocks(num_ranks)

    def of_blocks(self, num_ranks: int) -> int:
        """Count those of the blocks."""
        return sum(_numbers_on(block, num_ranks) for block in self.blocks)

    def outside_of_blocks(self, num_ranks: int) -> int:
        """Count those outside of the blocks."""
        return _numbers_on(self.outside, num_ranks)

    def largest_block(self, num_ranks: int) -> int:
        """Count those of the largest block."""
        return max(_numbers_on(block, num_ranks) for block in self.blocks)

    def touched(self, num_tokens: float) -> float:
        """Count the numbers in the rows of all tables that num_tokens are expected to touch."""
        return sum(table.numbers * table.touched_share(num_tokens) for table in self.tables)


def _numbers_on(shapes: list[torch.Size], num_ranks: int) -> int:
    """Count numbers with the rows that FSDP2 adds to a parameter of which the ranks divide no dimension."""
    numbers = 0
    for shape in shapes:
        sharded = shape[sharded_dimension(shape, num_ranks)]
        numbers += math.prod(shape) // sharded * math.ceil(sharded / num_ranks) * num_ranks
    return numbers


@functools.lru_cache(maxsize=1024)
def count_costs(config: TransformerConfig) -> ModelCosts:
    """Count the parameters and FLOPs of a model; no weight is made."""
    with torch.device("meta"):
        model = Transformer(config)
    attention = dense = query_network = scores = experts = 0
    for number, block in enumerate(model.blocks):
        attention += block.attention.flops_per_token(config.context_length)
        layer, flops = block.feed_forward, block.feed_forward.flops_per_token()
        if number not in config.blocks_with_experts:
            dense += flops.total
            continue
        experts += flops.experts
        of_queries = 2 * layer.router.query.weight.numel() if isinstance(layer, ProductKeyLayer) else flops.router
        query_network += of_queries
        scores += flops.router - of_queries
    tables = set(split_parameters(model).tables.values())
    blocks = [[parameter for parameter in block.parameters() if parameter not in tables] for block in model.blocks]
    inside = tables.union(*blocks)
    matrices = {parameter for parameter in model.parameters() if parameter.dim() > 1} - tables
    if not config.tied_embeddings:
        matrices -= {model.embedding.weight}
    return ModelCosts(
        forward_flops=FlopsByModule(
            attention=attention,
            dense_layers=dense,
            query_network=query_network,
            sub_key_scores=scores,
            experts=experts,
            head=2 * model.head.weight.numel(),
        ),
        parameters=model.num_parameters(),
        num_matmul=sum(parameter.numel() for parameter in matrices),
        blocks=[[parameter.shape for parameter in block] for block in blocks],
        outside=[parameter.shape for parameter in model.parameters() if parameter not in inside],
        tables=[
            TableSize(
                num_experts=len(layer.experts),
                num_vectors=layer.experts.shape[1],
                width=layer.model_dim,
                retrieved=layer.retrieved_per_token,
                row_bytes=layer.row_bytes,
            )
            for layer in model.modules()
            if isinstance(layer, ProductKeyLayer)
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Account:
    """The costs of one run, and how far its budget goes."""

    forward_flops: FlopsByModule
    """FLOPs a token of one forward pass; training costs three times as much."""
    parameters_total: int
    parameters_active: int
    """Parameters that take part in one token."""
    parameters_matmul: int
    """Parameters of matrix products, as ModelCosts.num_matmul."""
    forward_bytes: float
    """Bytes of weights that a forward pass reads for a token: its rows of the tables and of the embedding, and its
    share of the other weights, which are read once a micro-batch."""
    tokens_per_step: int
    num_steps: int
    passes_per_step: float = 3.0
    """The cost of a step's tokens in forward passes: three to train on them, and of a run that teaches as many again to
    go over old texts, or four where a teacher's predictions on them are kept."""

    @property
    def training_flops_per_step(self) -> int:
        """The FLOPs of one optimizer step."""
        return round(self.passes_per_step * self.forward_flops.total * self.tokens_per_step)

    @property
    def training_flops(self) -> int:
        """The FLOPs of all steps."""
        return self.training_flops_per_step * self.num_steps

    @property
    def training_flops_without_router(self) -> float:
        """The FLOPs of all steps, those that choose experts left out."""
        return self.training_flops * (1 - self.forward_flops.router / self.forward_flops.total)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all steps, repeated ones included."""
        return self.tokens_per_step * self.num_steps


def account(config: TrainConfig) -> Account:
    """Count the costs of a run; no weight is made.

    Args:
        config (TrainConfig): the run.

    Returns:
        Its parameters, FLOPs and bytes, and the steps that its budget affords.
    """
    model = count_costs(config.model)
    table_bytes: float = sum(table.retrieved * table.row_bytes for table in model.tables)
    if config.optimizer.table_dtype == "bf16" and getattr(config.model.expert_layer, "table_bits", None) is None:
        table_bytes /= 2
    matrices = model.num_matmul * config.gradient_accumulation / config.tokens_per_step
    remembered = [
        3 if memory.teacher is None else 4 for memory in (config.teaching.remember if config.teaching else ())
    ]
    passes = 3.0 + (statistics.fmean(remembered) if remembered else 0.0)
    step_flops = passes * model.forward_flops.total * config.tokens_per_step
    return Account(
        forward_flops=model.forward_flops,
        parameters_total=model.parameters.total,
        parameters_active=model.parameters.active,
        parameters_matmul=model.num_matmul,
        forward_bytes=_FP32_BYTES * (config.model.d_model + matrices) + table_bytes,
        tokens_per_step=config.tokens_per_step,
        num_steps=config.num_steps or int((config.training_flops or 0) // step_flops),
        passes_per_step=passes,
    )
