"""What a training run costs, before it is run: FLOPs by module, bytes, parameters, tokens.

FLOPs are those of the matrix products, as everywhere in this package (layers/feed_forward.py). The paper doesn't say
whether it counted the router, so that every total can be had without it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tinyexperts.layers import ProductKeyLayer
from tinyexperts.layers.feed_forward import ParameterCount
from tinyexperts.model import Transformer, TransformerConfig
from tinyexperts.training.config import TrainConfig

_FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class FlopsByModule:
    """FLOPs a token of one forward pass."""

    attention: int
    dense_layers: int
    query_network: int
    """Of PEER and product-key memory; the router of a mixture of experts."""
    sub_key_scores: int
    experts: int
    """Arithmetic of the retrieved rows, or of the chosen dense experts."""
    head: int

    @property
    def router(self) -> int:
        return self.query_network + self.sub_key_scores

    @property
    def total(self) -> int:
        return self.attention + self.dense_layers + self.router + self.experts + self.head


@dataclass(frozen=True, kw_only=True)
class Account:
    """One run: what it costs and how far its budget goes.

    forward_flops: FLOPs a token of one forward pass; training costs three times as much
    parameters_total, parameters_active: all, and those that take part in one token
    parameters_matmul: those of matrix products: neither tables nor the embedding; a mixture's experts all count
    forward_bytes: bytes of weights that a forward pass reads for a token: its rows of the tables and of the embedding,
        and its share of the other weights, which are read once a micro-batch
    """

    forward_flops: FlopsByModule
    parameters_total: int
    parameters_active: int
    parameters_matmul: int
    forward_bytes: float
    tokens_per_step: int
    num_steps: int

    @property
    def training_flops_per_step(self) -> int:
        return 3 * self.forward_flops.total * self.tokens_per_step

    @property
    def training_flops(self) -> int:
        return self.training_flops_per_step * self.num_steps

    @property
    def training_flops_without_router(self) -> float:
        return self.training_flops * (1 - self.forward_flops.router / self.forward_flops.total)

    @property
    def num_tokens(self) -> int:
        return self.tokens_per_step * self.num_steps


@dataclass(frozen=True, kw_only=True)
class _ModelAccount:
    forward_flops: FlopsByModule
    parameters: ParameterCount
    num_matmul: int
    row_bytes: int


def account(config: TrainConfig) -> Account:
    """Account for a run of a configuration; no weight is made."""
    model = _account_of_model(config.model)
    step_flops = 3 * model.forward_flops.total * config.tokens_per_step
    return Account(
        forward_flops=model.forward_flops,
        parameters_total=model.parameters.total,
        parameters_active=model.parameters.active,
        parameters_matmul=model.num_matmul,
        forward_bytes=model.row_bytes
        + model.num_matmul * _FP32_BYTES * config.gradient_accumulation / config.tokens_per_step,
        tokens_per_step=config.tokens_per_step,
        num_steps=config.num_steps or int((config.training_flops or 0) // step_flops),
    )


@functools.lru_cache(maxsize=1024)
def _account_of_model(config: TransformerConfig) -> _ModelAccount:
    with torch.device("meta"):
        model = Transformer(config)
    attention = dense = query_network = scores = experts = 0
    row_bytes = config.d_model * _FP32_BYTES  # of the embedding
    for number, block in enumerate(model.blocks):
        attention += block.attention.flops_per_token(config.context_length)
        layer, flops = block.feed_forward, block.feed_forward.flops_per_token()
        if number not in config.blocks_with_experts:
            dense += flops.total
            continue
        experts += flops.experts
        if isinstance(layer, ProductKeyLayer):
            of_queries = 2 * layer.router.query.weight.numel()
            query_network += of_queries
            scores += flops.router - of_queries
            row_bytes += layer.retrieved_per_token * layer.experts.shape[1] * config.d_model * _FP32_BYTES
        else:
            query_network += flops.router
    tables = {parameter for block in model.blocks for parameter in block.feed_forward.parameter_groups().tables}
    matrices = {parameter for parameter in model.parameters() if parameter.dim() > 1} - tables
    if not config.tied_embeddings:
        matrices -= {model.embedding.weight}
    return _ModelAccount(
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
        row_bytes=row_bytes,
    )
