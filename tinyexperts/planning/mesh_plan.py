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
from tinyexperts.training.config import TrainConfig, with_settings
from tinyexperts.training.run import choose_table_gradients

_BYTES = 4  # of fp32
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
    """Plan each mesh that the devices and the model's width allow, the largest table groups first.

    Raises:
        InputError: the devices do not divide the batch.
    """
    if config.batch_size % devices.count:
        raise InputError(f"batch_size must be a multiple of the {devices.count} devices, got {config.batch_size}")
    # Planned for a machine that is not this one: "auto" means GPUs that compute in bf16.
    device = torch.device("cuda" if config.device == "auto" else config.device)
    sparse_tables, _ = choose_table_gradients(config, device)
    precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    costs, activations = count_costs(config.model), count_activations(config.model, device, precision)
    width = config.model.d_model
    # A second moment of rows is a mean over all columns.
    can_share = bool(costs.tables) and not (sparse_tables and config.optimizer.table_second_moment == "row")
    shards = [
        count
        for count in range(1, (devices.count if can_share else 1) + 1)
        if devices.count % count == width % count == 0 and (count == 1 or width // count >= MIN_COLUMNS)
    ]
    return [_plan_of_mesh(config, devices, costs, activations, count, sparse_tables) for count in reversed(shards)]


def smaller_plans(config: TrainConfig, devices: Devices) -> dict[str, MeshPlan]:
    """Find the changes, as options, that take at least a twentieth less memory, each with its smallest plan.

    The least memory comes first.
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
    least = min(each.memory.total for each in plan(config, devices))
    found = {}
    for options, change in changes.items():
        smallest = min(plan(with_settings(config, change), devices), key=lambda each: each.memory.total)
        if smallest.memory.total < 0.95 * least:
            found[options] = smallest
    return dict(sorted(found.items(), key=lambda item: item[1].memory.total))


def column_bytes_of_token(retrieved: int, num_vectors: int, width: int, num_shards: int) -> tuple[float, float]:
    """Count the bytes that a token sends to the ranks that share a table, in a forward and in a backward pass.

    x and y by all-to-all; the parts of the products and the coefficients to or from all others, forward the ids too.
    """
    others = num_shards - 1
    columns = _BYTES * width * others / num_shards * _num_operands(num_vectors)
    backward = columns + num_vectors * _BYTES * retrieved * others
    return backward + _ID_BYTES * retrieved * others, backward


def _num_operands(num_vectors: int) -> int:
    """Return 2 for x and y, or 1 for y alone: experts that are a value read no input."""
    return 2 if num_vectors > 1 else 1


def _plan_of_mesh(
    config: TrainConfig,
    devices: Devices,
    costs: ModelCosts,
    activations: Activations,
    num_shards: int,
    sparse_tables: bool,
) -> MeshPlan:
    num_ranks, num_replicas = devices.count, devices.count // num_shards
    micro_tokens = config.batch_size * config.model.context_length / num_ranks
    step_tokens = micro_tokens * config.gradient_accumulation
    memory = _memory(config, costs, activations, num_ranks, num_shards, micro_tokens, sparse_tables)
    exchanges = _exchanges(costs, num_ranks, num_shards, num_replicas, micro_tokens)
    exchanges = Exchanges(**{name: config.gradient_accumulation * value for name, value in vars(exchanges).items()})
    flops = 3 * costs.forward_flops.total * step_tokens
    return MeshPlan(
        replicate=num_replicas,
        table=num_shards,
        memory=memory,
        exchanges=exchanges,
        flops=flops,
        compute_seconds=flops / (devices.flops * UTILIZATION),
        memory_seconds=_moved_bytes(config, costs, activations, num_ranks, num_shards, step_tokens, sparse_tables)
        / devices.memory_speed,
        exchange_seconds=exchanges.columns / devices.speed_among(num_shards)
        + (exchanges.dense_part + exchanges.replicas) / devices.speed_among(num_ranks),
    )


def _memory(
    config: TrainConfig,
    costs: ModelCosts,
    activations: Activations,
    num_ranks: int,
    num_shards: int,
    micro_tokens: float,
    sparse_tables: bool,
) -> Memory:
    tables = sum(table.numbers for table in costs.tables) / num_shards
    dense = costs.dense(num_ranks) / num_ranks
    all_tokens = micro_tokens * num_ranks
    gathered = 0
    if num_ranks > 1:  # weights and gradients of what lies outside, of the block at work, and the next one's weights
        gathered = 2 * costs.outside_of_blocks(num_ranks) + 3 * costs.largest_block(num_ranks)
    table_moments = 2 * tables
    if sparse_tables and config.optimizer.table_second_moment == "row":
        table_moments = tables + sum(table.num_experts * table.num_vectors for table in costs.tables)
    gradients = _table_gradients(config, costs, all_tokens, sparse_tables) / num_shards
    # Ids and coefficients of the tokens of all others of a table are kept.
    others = sum((num_shards - 1) * table.retrieved * (_ID_BYTES + _BYTES) for table in costs.tables)
    held = activations.bytes + micro_tokens * (activations.bytes_of_token + others)
    # A dense gradient is put together from the touched rows, when most activations are gone.
    touched = 0.0 if sparse_tables else _BYTES * costs.touched(all_tokens) / num_shards
    weights, moments = _BYTES * (dense + tables), _BYTES * (2 * dense + table_moments)
    return Memory(
        weights=weights,
        gathered=_BYTES * gathered,
        gradients=_BYTES * (dense + gradients),
        moments=moments,
        activations=max(held, touched),
        copies=weights + moments if config.checkpoint.asynchronous else 0.0,
    )


def _table_gradients(config: TrainConfig, costs: ModelCosts, micro_tokens: float, sparse_tables: bool) -> float:
    """Count the numbers in the gradients of all tables, when most of them are there."""
    touched = costs.touched(micro_tokens)
    num_passes = config.gradient_accumulation
    if not sparse_tables:  # that of this pass, and the sum of the passes before
        return sum(table.numbers for table in costs.tables) * min(num_passes, 2)
    if num_passes == 1:  # on a CPU nothing is written out: the fused step sums each row when it updates it
        return 0.0 if config.device == "cpu" else touched
    return num_passes * touched + costs.touched(num_passes * micro_tokens)  # kept side by side, then summed


def _exchanges(costs: ModelCosts, num_ranks: int, num_shards: int, num_replicas: int, micro_tokens: float) -> Exchanges:
    """Count one micro-batch: FSDP2 gathers weights forward, those of blocks again backward, and scatters gradients."""
    columns = replicas = 0.0
    for table in costs.tables:
        columns += sum(column_bytes_of_token(table.retrieved, table.num_vectors, table.width, num_shards))
        pairs = num_shards * table.retrieved * (_ID_BYTES + table.num_vectors * _BYTES)
        replicas += (num_replicas - 1) * (pairs + _num_operands(table.num_vectors) * table.width * _BYTES)
    return Exchanges(
        dense_part=_BYTES * (num_ranks - 1) / num_ranks * (2 * costs.dense(num_ranks) + costs.of_blocks(num_ranks)),
        columns=columns * micro_tokens,
        replicas=replicas * micro_tokens,
    )


def _moved_bytes(
    config: TrainConfig,
    costs: ModelCosts,
    activations: Activations,
    num_ranks: int,
    num_shards: int,
    step_tokens: float,
    sparse_tables: bool,
) -> float:
    """Count the bytes that move between a device and its memory in a step.

    Weights forward and backward; activations written and read, and their gradients; retrieved rows forward and
    backward; values and moments read and written by the optimiser, with the gradient.
    """
    dense = costs.dense(num_ranks)
    moved = _BYTES * (2 * config.gradient_accumulation * dense + 8 * dense / num_ranks)
    moved += 4 * activations.bytes_of_token * step_tokens
    for table in costs.tables:
        moved += 2 * _BYTES * step_tokens * table.retrieved * table.num_vectors * table.width
        share = table.touched_share(step_tokens * num_ranks) if sparse_tables else 1.0
        moved += 8 * _BYTES * share * table.numbers / num_shards
    return moved
