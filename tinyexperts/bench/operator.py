"""The experts' forward pass alone, in turns with reads of the same rows: the machine's limit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.bench import limit
from tinyexperts.bench.check import values_of
from tinyexperts.bench.inputs import pool_size
from tinyexperts.bench.timing import Spread, billions_per_second, interleaved, timed
from tinyexperts.layers import PEER
from tinyexperts.ops import expert_mlp
from tinyexperts.ops.without_kernels import without_kernels


@dataclass(frozen=True, kw_only=True)
class OperatorMeasurement:
    """The experts' forward pass alone, with ids of one kind; ratios are the other's time over ours, round by round."""

    bytes: int
    """The bytes that must move: the retrieved rows."""
    flops: int
    limit_variant: str
    """The fastest way to read the rows and do nothing else."""
    limit_gb_per_second: float
    limit_gb_per_second_by_variant: dict[str, float]
    forward_seconds: Spread
    gb_per_second: float
    gflop_per_second: float
    share_of_limit: Spread
    reference_forward_seconds: Spread
    """The seconds in plain torch."""
    reference_forward_ratio: Spread
    values_forward_seconds: Spread
    """The seconds with a table of values, as a product-key memory has it."""
    embedding_bag_forward_seconds: Spread
    """The seconds of F.embedding_bag with the same table of values."""
    embedding_bag_forward_ratio: Spread


def draw_ids(kind: str, num_experts: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw ids (int64).

    Args:
        kind (str): "uniform", or "zipf": the r-th most frequent expert has a probability in proportion to 1 / r.
        num_experts (int): ids are from 0 to N - 1.
        shape (tuple[int, ...]): that of the result.
        generator (torch.Generator): the source of randomness.
    """
    if kind == "uniform":
        return torch.randint(num_experts, shape, generator=generator)
    cumulative = (1 / torch.arange(1, num_experts + 1, dtype=torch.float64)).cumsum(0)
    places = torch.searchsorted(
        cumulative, torch.rand(shape, generator=generator, dtype=torch.float64) * cumulative[-1]
    )
    # The frequent ones are anywhere in the table.
    return torch.randperm(num_experts, generator=generator)[places.clamp(max=num_experts - 1)]


def measure_operator(
    layer: PEER, kind: str, num_tokens: int, *, repeats: int, generator: torch.Generator
) -> OperatorMeasurement:
    """Measure the experts' forward pass alone.

    Args:
        layer (PEER): the layer with the table.
        kind (str): the kind of ids, as in `draw_ids`.
        num_tokens (int): tokens of a batch M.
        repeats (int): rounds that a median is taken over.
        generator (torch.Generator): the source of randomness.
    """
    table = layer.experts.detach()
    num_experts, num_vectors, d_model = table.shape
    shape = (pool_size(num_tokens), num_tokens, layer.retrieved_per_token)
    ids = draw_ids(kind, num_experts, shape, generator)
    x = torch.randn(*shape[:2], d_model, generator=generator)
    weights = torch.rand(shape, generator=generator)
    batches = cycle([(*batch, batch[1].flatten().numpy()) for batch in zip(x, ids, weights, strict=True)])
    words, values = limit.words_of(table), values_of(table)

    def read(variant: limit.Variant) -> None:
        limit.read_rows(words, next(batches)[3], variant)

    def experts(table_NED: Tensor, activation: str | None) -> Tensor:
        x_MD, ids_MP, weights_MP, _ = next(batches)
        return expert_mlp(x_MD, table_NED, ids_MP, weights_MP, activation)

    def reference() -> Tensor:
        with without_kernels():
            return experts(table, layer.activation)

    def embedding_bag() -> Tensor:
        _, ids_MP, weights_MP, _ = next(batches)
        return F.embedding_bag(ids_MP, values[:, 0], mode="sum", per_sample_weights=weights_MP)

    variants = {str(variant): timed(partial(read, variant)) for variant in limit.VARIANTS}
    with torch.no_grad():
        times = interleaved(
            {
                **variants,
                "experts": timed(partial(experts, table, layer.activation)),
                "reference": timed(reference),
                "values": timed(partial(experts, values, None)),
                "embedding_bag": timed(embedding_bag),
            },
            repeats,
        )
    seconds = {name: rounds[:, 0] for name, rounds in times.items()}
    best = min(variants, key=lambda variant: float(np.median(seconds[variant])))
    num_pairs = num_tokens * layer.retrieved_per_token
    num_bytes = num_pairs * table[0].numel() * table.element_size()
    flops = 2 * num_pairs * num_vectors * d_model
    limits = {variant: billions_per_second(num_bytes, seconds[variant]) for variant in variants}
    return OperatorMeasurement(
        bytes=num_bytes,
        flops=flops,
        limit_variant=best,
        limit_gb_per_second=limits[best],
        limit_gb_per_second_by_variant=limits,
        forward_seconds=Spread.of(seconds["experts"]),
        gb_per_second=billions_per_second(num_bytes, seconds["experts"]),
        gflop_per_second=billions_per_second(flops, seconds["experts"]),
        share_of_limit=Spread.of(seconds[best] / seconds["experts"]),
        reference_forward_seconds=Spread.of(seconds["reference"]),
        reference_forward_ratio=Spread.of(seconds["reference"] / seconds["experts"]),
        values_forward_seconds=Spread.of(seconds["values"]),
        embedding_bag_forward_seconds=Spread.of(seconds["embedding_bag"]),
        embedding_bag_forward_ratio=Spread.of(seconds["embedding_bag"] / seconds["values"]),
    )
