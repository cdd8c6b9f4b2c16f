"""The plan of a run on several devices: memory, exchanges, FLOPs and time of a step, for every mesh of them.

What a model holds is counted (model_costs.py); speeds are assumed, and so are the estimates of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tinyexperts.errors import InputError
from tinyexperts.layers.product_key_layer import MIN_COLUMNS
from tinyexperts.planning.activation_memory import Activations, count_activations
from tinyexperts.planning.devices import UTILIZATION, Devices
from tinyexperts.planning.model_costs import ModelCosts, count_costs
from tinyexperts.training.config import (
    TrainConfig,
    refuse_bf16_tables_of_ranks,
    refuse_quantized_tables,
    with_settings,
)
from tinyexperts.training.run import choose_table_gradients

_BYTES = 4  # of fp32
_BF16_BYTES = 2
_ID_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its peak."""

    weights: float
    gathered: float
    """Whole weights, by FSDP2, of the parts of the model that are at work, and their gradients."""
    gradients: float
    moments: float
    activations: float
    """Activations, or the rows that a table's gradient is made of, where these are more."""
    copies: float
    """Copies of weights and moments, for a checkpoint that is written while training continues."""

    @property
    def total(self) -> float:
        """The sum of all."""
        return self.weights + self.gathered + self.gradients + self.moments + self.activations + self.copies


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """Bytes that one rank sends in a step."""

    dense_part: float
    columns: float
    replicas: float

    @property
    def total(self) -> float:
        """The sum of all."""
        return self.dense_part + self.columns + self.replicas


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """A step of one mesh (replicate, table); the seconds are those that each bound alone would take."""

    replicate: int
    table: int
    memory: Memory
    exchanges: Exchanges
    flops: float
    """FLOPs of one rank in a step."""
    compute_seconds: float
    memory_seconds: float
    exchange_seconds: float

    @property
    def step_seconds(self) -> float:
        """The time of a step: arithmetic and memory at once, exchanges alone."""
        return max(self.compute_seconds, self.memory_seconds) + self.exchange_seconds

    def fits(self, devices: Devices) -> bool:
        """Return True if the plan uses at most 90 % of a device's memory; the rest is for what is not counted."""
        return self.memory.total <= 0.9 * devices.memory_bytes

    @property
    def bound(self) -> str:
        """The name of the longest of the three times."""
        bounds = {
            "arithmetic": self.compute_seconds,
            "memory": self.memory_seconds,
            "exchanges": self.exchange_seconds,
        }
        return max(bounds, key=bounds.__getitem__)


def plan(config: TrainConfig, devices: Devices) -> list[MeshPlan]:
    """Plan each mesh that the devices and the model's width allow.

    Args:
        config (TrainConfig): the run; its device "auto" stands for GPUs.
        devices (Devices): the devices, which this machine need not have.

    Returns:
        A plan for each mesh, the largest table groups first.

    Raises:
        InputError: the devices do not divide the batch, the table is quantized, or several devices train it in bf16.
    """
    if config.batch_size % devices.count:
        raise InputError(f"batch_size must be a multiple of the {devices.count} devices, got {config.batch_size}")
    # Planned for a machine that is not this one: "auto" means GPUs that compute in bf16.
    device = torch.device("cuda" if config.device == "auto" else config.device)
    sparse_tables, _ = choose_table_gradients(config, device)
    precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    refuse_quantized_tables(config.model)
    refuse_bf16_tables_of_ranks(config, devices.count)
    costs, activations = count_costs(config.model), count_activations(config.model, device, precision)
    width = config.model.d_model
    # A second moment of rows is a mean over all columns.
    can_share = bool(costs.tables) and not (sparse_tables and config.optimizer.table_second_moment == "row")
    shards = [
        count
        for count in range(1, (devices.count if can_share else 1) + 1)
        if devices.count % count == width % count == 0 and (count == 1 or width // count >= MIN_COLUMNS)
    ]
    return [
        _Mesh(config, costs, activations, sparse_tables, devices.count, num_shards).plan(devices)
        for num_shards in reversed(shards)
    ]


def smaller_plans(config: TrainConfig, devices: Devices) -> dict[str, MeshPlan]:
    """Find changes of a run that take at least a twentieth less memory.

    Args:
        config (TrainConfig): the run.
        devices (Devices): the devices.

    Returns:
        The smallest plan of each change by the options that make it, the least memory first.

    Raises:
        InputError: the devices do not divide the batch.
    """
    sequences, count = config.batch_size * config.gradient_accumulation, devices.count
    changes: dict[str, dict[str, Any]] = {
        f"--gradient-accumulation 1 --batch-size {sequences}": {"gradient_accumulation": 1, "batch_size": sequences},
        f"--gradient-accumulation 1 --batch-size {count}": {"gradient_accumulation": 1, "batch_size": count},
        f"--batch-size {count} --gradient-accumulation {-(-sequences // count)}": {
            "batch_size": count,
            "gradient_accumulation": -(-sequences // count),
        },
        "--checkpoint.no-asynchronous": {"checkpoint.asynchronous": False},
        "--optimizer.table-gradients sparse": {"optimizer.table_gradients": "sparse"},
        "--optimizer.table-second-moment row": {"optimizer.table_second_moment": "row"},
    }
    if count == 1 and config.optimizer.table_gradients != "dense":
        changes["--optimizer.table-dtype bf16"] = {"optimizer.table_dtype": "bf16"}
    least = min(each.memory.total for each in plan(config, devices))
    found = {}
    for options, change in changes.items():
        smallest = min(plan(with_settings(config, change), devices), key=lambda each: each.memory.total)
        if smallest.memory.total < 0.95 * least:
            found[options] = smallest
    return dict(sorted(found.items(), key=lambda item: item[1].memory.total))


def column_bytes_of_token(retrieved: int, num_vectors: int, width: int, num_shards: int) -> tuple[float, float]:
    """Count the bytes that a token sends to the ranks that share a table.

    x and y by all-to-all; the parts of the products and the coefficients to or from all others, forward the ids too.

    Args:
        retrieved (int): experts that a token retrieves, P.
        num_vectors (int): vectors of an expert, E.
        width (int): model width D.
        num_shards (int): ranks that share the table.

    Returns:
        The bytes of a forward pass and those of a backward pass.
    """
    others = num_shards - 1
    columns = _BYTES * width * others / num_shards * _num_operands(num_vectors)
    backward = columns + num_vectors * _BYTES * retrieved * others
    return backward + _ID_BYTES * retrieved * others, backward


def _num_operands(num_vectors: int) -> int:
    """Return 2 for x and y, or 1 for y alone: experts that are a value read no input."""
    return 2 if num_vectors > 1 else 1


@dataclass(frozen=True)
class _Mesh:
    """One mesh of the devices, and the run that is planned on it."""

    config: TrainConfig
    costs: ModelCosts
    activations: Activations
    sparse_tables: bool
    num_ranks: int
    num_shards: int

    @property
    def table_bytes(self) -> int:
        """The bytes of a number of a table."""
        return _BYTES if self.config.optimizer.table_dtype == "fp32" else _BF16_BYTES

    @property
    def micro_tokens(self) -> float:
        """The tokens of one rank in a micro-batch."""
        return self.config.batch_size * self.config.model.context_length / self.num_ranks

    def plan(self, devices: Devices) -> MeshPlan:
        step_tokens = self.micro_tokens * self.config.gradient_accumulation
        exchanges = self.exchanges()
        flops = 3 * self.costs.forward_flops.total * step_tokens
        return MeshPlan(
            replicate=self.num_ranks // self.num_shards,
            table=self.num_shards,
            memory=self.memory(),
            exchanges=exchanges,
            flops=flops,
            compute_seconds=flops / (devices.flops * UTILIZATION),
            memory_seconds=self.moved_bytes(step_tokens) / devices.memory_speed,
            exchange_seconds=exchanges.columns / devices.speed_among(self.num_shards)
            + (exchanges.dense_part + exchanges.replicas) / devices.speed_among(self.num_ranks),
        )

    def memory(self) -> Memory:
        costs, config, num_ranks, num_shards = self.costs, self.config, self.num_ranks, self.num_shards
        tables = sum(table.numbers for table in costs.tables) / num_shards
        dense = costs.dense(num_ranks) / num_ranks
        all_tokens = self.micro_tokens * num_ranks
        gathered = 0
        if (
            num_ranks > 1
        ):  # weights and gradients outside of the blocks and of the block at work, the next one's weights
            gathered = 2 * costs.outside_of_blocks(num_ranks) + 3 * costs.largest_block(num_ranks)
        table_moments = 2 * tables
        if self.sparse_tables and config.optimizer.table_second_moment == "row":
            table_moments = tables + sum(table.num_experts * table.num_vectors for table in costs.tables)
        gradients = self.table_gradients(all_tokens) / num_shards
        # Ids and coefficients of the tokens of all others of a table are kept.
        others = sum((num_shards - 1) * table.retrieved * (_ID_BYTES + _BYTES) for table in costs.tables)
        held = self.activations.bytes + self.micro_tokens * (self.activations.bytes_of_token + others)
        # A dense gradient is put together from the touched rows, when most activations are gone.
        touched = 0.0 if self.sparse_tables else _BYTES * costs.touched(all_tokens) / num_shards
        weights, moments = _BYTES * dense + self.table_bytes * tables, _BYTES * (2 * dense + table_moments)
        return Memory(
            weights=weights,
            gathered=_BYTES * gathered,
            gradients=_BYTES * dense + self.table_bytes * gradients,
            moments=moments,
            activations=max(held, touched),
            copies=weights + moments if config.checkpoint.asynchronous else 0.0,
        )

    def table_gradients(self, micro_tokens: float) -> float:
        """Count the numbers in the gradients of all tables, when most of them are there."""
        touched = self.costs.touched(micro_tokens)
        num_passes = self.config.gradient_accumulation
        if not self.sparse_tables:  # that of this pass, and the sum of the passes before
            return sum(table.numbers for table in self.costs.tables) * min(num_passes, 2)
        if num_passes == 1:  # on a CPU nothing is written out: the fused step sums each row when it updates it
            return 0.0 if self.config.device == "cpu" else touched
        return num_passes * touched + self.costs.touched(num_passes * micro_tokens)  # all are kept, then summed

    def exchanges(self) -> Exchanges:
        """Count a step: FSDP2 gathers weights forward, those of blocks again backward, and scatters gradients."""
        costs, num_ranks, num_passes = self.costs, self.num_ranks, self.config.gradient_accumulation
        dense_part = _BYTES * (num_ranks - 1) / num_ranks * (2 * costs.dense(num_ranks) + costs.of_blocks(num_ranks))
        columns = replicas = 0.0
        for table in costs.tables:
            columns += sum(column_bytes_of_token(table.retrieved, table.num_vectors, table.width, self.num_shards))
            pairs = self.num_shards * table.retrieved * (_ID_BYTES + table.num_vectors * _BYTES)
            num_others = num_ranks // self.num_shards - 1
            replicas += num_others * (pairs + _num_operands(table.num_vectors) * table.width * _BYTES)
        return Exchanges(
            dense_part=num_passes * dense_part,
            columns=num_passes * (columns * self.micro_tokens),
            replicas=num_passes * (replicas * self.micro_tokens),
        )

    def moved_bytes(self, step_tokens: float) -> float:
        """Count the bytes that move between a device and its memory in a step.

        Weights forward and backward; activations written and read, and their gradients; retrieved rows forward and
        backward; values and moments read and written by the optimizer, with the gradient.
        """
        dense = self.costs.dense(self.num_ranks)
        moved = _BYTES * (2 * self.config.gradient_accumulation * dense + 8 * dense / self.num_ranks)
        moved += 4 * self.activations.bytes_of_token * step_tokens
        for table in self.costs.tables:
            moved += 2 * self.table_bytes * step_tokens * table.retrieved * table.num_vectors * table.width
            share = table.touched_share(step_tokens * self.num_ranks) if self.sparse_tables else 1.0
            # Value and gradient are of the table's type, the moments fp32.
            moved += 4 * (self.table_bytes + _BYTES) * share * table.numbers / self.num_shards
        return moved
