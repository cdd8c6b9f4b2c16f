"""What a run would take on several devices: memory, exchanges, FLOPs and time of a step, for every mesh of them.

What a model holds is counted (model_costs.py); speeds are assumed, and so are the estimates of time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from tinyexperts.errors import InputError
from tinyexperts.layers.product_key_layer import MIN_COLUMNS
from tinyexperts.planning.model_costs import ModelSizes, count_sizes
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.run import choose_table_gradients

_BYTES = 4  # of fp32
_ID_BYTES = 8
# Of a device's arithmetic, in large matrix products.
UTILISATION = 0.4


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Equal devices, on nodes of `per_node`; speeds are each device's.

    memory_bytes: memory; flops: peak FLOP/s; memory_speed: bytes a second of its memory
    link_speed, node_link_speed: bytes a second that it sends to others of its node, and to those of other nodes
    """

    count: int
    per_node: int
    memory_bytes: float
    flops: float
    memory_speed: float
    link_speed: float
    node_link_speed: float

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        per_node: int,
        tflops: float,
        memory_gb_per_second: float,
        link_gb_per_second: float,
        node_link_gb_per_second: float,
    ) -> Devices:
        """From "8x80GB", the devices of a node, and speeds.

        Raises:
            InputError: another form, nodes that are not equal, or a speed that is not positive.
        """
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)GB", text)
        if match is None or int(match[1]) < 1 or not float(match[2]) > 0:
            raise InputError(f"devices must be a number and the memory of each, as 8x80GB, got {text!r}")
        count = int(match[1])
        if per_node < 1 or (count > per_node and count % per_node):
            raise InputError(f"devices_per_node must divide the {count} devices, got {per_node}")
        speeds = (tflops, memory_gb_per_second, link_gb_per_second, node_link_gb_per_second)
        if not min(speeds) > 0:
            raise InputError(f"speeds must be positive, got {', '.join(f'{speed:g}' for speed in speeds)}")
        return cls(
            count=count,
            per_node=per_node,
            memory_bytes=float(match[2]) * 1e9,
            flops=tflops * 1e12,
            memory_speed=memory_gb_per_second * 1e9,
            link_speed=link_gb_per_second * 1e9,
            node_link_speed=node_link_gb_per_second * 1e9,
        )

    def speed_among(self, num_ranks: int) -> float:
        """Of an exchange of so many neighbouring ranks: that between nodes, where they are not of one."""
        within = self.count <= self.per_node or self.per_node % num_ranks == 0
        return self.link_speed if within else self.node_link_speed


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its peak."""

    weights: float
    gathered: float
    """Of FSDP2: the whole weights of the parts of the model that are at work, and their gradients."""
    gradients: float
    moments: float
    activations: float
    """Or the rows that a table's gradient is made of, where these are more."""
    copies: float
    """Of weights and moments, for a checkpoint that is written beside the training."""

    @property
    def total(self) -> float:
        return self.weights + self.gathered + self.gradients + self.moments + self.activations + self.copies


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """Bytes that one rank sends in a step."""

    dense_part: float
    columns: float
    replicas: float

    @property
    def total(self) -> float:
        return self.dense_part + self.columns + self.replicas


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """A step of one mesh (replicate, table); the seconds are those that each bound alone would take."""

    replicate: int
    table: int
    memory: Memory
    exchanges: Exchanges
    flops: float
    """Of one rank in a step"""
    compute_seconds: float
    memory_seconds: float
    exchange_seconds: float

    @property
    def step_seconds(self) -> float:
        """Arithmetic and memory at once, exchanges beside nothing."""
        return max(self.compute_seconds, self.memory_seconds) + self.exchange_seconds

    def fits(self, devices: Devices) -> bool:
        """Whether the memory does, with a tenth left for what was not counted."""
        return self.memory.total <= 0.9 * devices.memory_bytes

    @property
    def bound(self) -> str:
        """Which of the three rules."""
        bounds = {
            "arithmetic": self.compute_seconds,
            "memory": self.memory_seconds,
            "exchanges": self.exchange_seconds,
        }
        return max(bounds, key=bounds.__getitem__)


def plan(config: TrainConfig, devices: Devices) -> list[MeshPlan]:
    """A plan for each mesh that the devices and the model's width allow, the largest table groups first.

    Raises:
        InputError: the devices do not divide the batch.
    """
    if config.batch_size % devices.count:
        raise InputError(f"batch_size must be a multiple of the {devices.count} devices, got {config.batch_size}")
    # Planned for a machine that is not this one: "auto" means GPUs that compute in bf16.
    device = torch.device("cuda" if config.device == "auto" else config.device)
    sparse_tables, _ = choose_table_gradients(config, device)
    precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    sizes = count_sizes(config.model, device, precision)
    width = config.model.d_model
    # A second moment of rows is a mean over all columns.
    can_share = bool(sizes.tables) and not (sparse_tables and config.table_second_moment == "row")
    shards = [
        count
        for count in range(1, (devices.count if can_share else 1) + 1)
        if devices.count % count == width % count == 0 and (count == 1 or width // count >= MIN_COLUMNS)
    ]
    return [_plan_of_mesh(config, devices, sizes, count, sparse_tables) for count in reversed(shards)]


def smaller_plans(config: TrainConfig, devices: Devices) -> dict[str, MeshPlan]:
    """Changes of one setting, as options, that take a twentieth less memory at least, each with its smallest plan.

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
        "--no-asynchronous-checkpoints": {"asynchronous_checkpoints": False},
        "--table-gradients sparse": {"table_gradients": "sparse"},
        "--table-second-moment row": {"table_second_moment": "row"},
    }
    least = min(each.memory.total for each in plan(config, devices))
    found = {}
    for options, change in changes.items():
        smallest = min(plan(replace(config, **change), devices), key=lambda each: each.memory.total)
        if smallest.memory.total < 0.95 * least:
            found[options] = smallest
    return dict(sorted(found.items(), key=lambda item: item[1].memory.total))


def column_bytes_of_token(retrieved: int, num_vectors: int, width: int, num_shards: int) -> tuple[float, float]:
    """Bytes that a token sends to the ranks that share a table, in a forward and in a backward pass.

    x and y by all-to-all; the parts of the products and the coefficients to or from all others, forward the ids too.
    """
    others = num_shards - 1
    columns = _BYTES * width * others / num_shards * _num_operands(num_vectors)
    backward = columns + num_vectors * _BYTES * retrieved * others
    return backward + _ID_BYTES * retrieved * others, backward


def _num_operands(num_vectors: int) -> int:
    """x and y, or y alone: experts that are a value read no input."""
    return 2 if num_vectors > 1 else 1


def _plan_of_mesh(
    config: TrainConfig, devices: Devices, sizes: ModelSizes, num_shards: int, sparse_tables: bool
) -> MeshPlan:
    num_ranks, num_replicas = devices.count, devices.count // num_shards
    micro_tokens = config.batch_size * config.model.context_length / num_ranks
    step_tokens = micro_tokens * config.gradient_accumulation
    memory = _memory(config, sizes, num_ranks, num_shards, micro_tokens, sparse_tables)
    exchanges = _exchanges(sizes, num_ranks, num_shards, num_replicas, micro_tokens)
    exchanges = Exchanges(**{name: config.gradient_accumulation * value for name, value in vars(exchanges).items()})
    flops = 3 * sizes.forward_flops * step_tokens
    return MeshPlan(
        replicate=num_replicas,
        table=num_shards,
        memory=memory,
        exchanges=exchanges,
        flops=flops,
        compute_seconds=flops / (devices.flops * UTILISATION),
        memory_seconds=_moved_bytes(config, sizes, num_ranks, num_shards, step_tokens, sparse_tables)
        / devices.memory_speed,
        exchange_seconds=exchanges.columns / devices.speed_among(num_shards)
        + (exchanges.dense_part + exchanges.replicas) / devices.speed_among(num_ranks),
    )


def _memory(
    config: TrainConfig, sizes: ModelSizes, num_ranks: int, num_shards: int, micro_tokens: float, sparse_tables: bool
) -> Memory:
    tables = sum(table.numbers for table in sizes.tables) / num_shards
    dense = sizes.dense(num_ranks) / num_ranks
    all_tokens = micro_tokens * num_ranks
    gathered = 0
    if num_ranks > 1:  # weights and gradients of what lies outside, of the block at work, and the next one's weights
        gathered = 2 * sizes.outside_of_blocks(num_ranks) + 3 * sizes.largest_block(num_ranks)
    table_moments = 2 * tables
    if sparse_tables and config.table_second_moment == "row":
        table_moments = tables + sum(table.num_experts * table.num_vectors for table in sizes.tables)
    gradients = _table_gradients(config, sizes, all_tokens, sparse_tables) / num_shards
    # Ids and coefficients of the tokens of all others of a table are kept.
    others = sum((num_shards - 1) * table.retrieved * (_ID_BYTES + _BYTES) for table in sizes.tables)
    activations = sizes.activation_bytes + micro_tokens * (sizes.activation_bytes_of_token + others)
    # A dense gradient is put together from the touched rows, when most activations are gone.
    touched = 0.0 if sparse_tables else _BYTES * sizes.touched(all_tokens) / num_shards
    weights, moments = _BYTES * (dense + tables), _BYTES * (2 * dense + table_moments)
    return Memory(
        weights=weights,
        gathered=_BYTES * gathered,
        gradients=_BYTES * (dense + gradients),
        moments=moments,
        activations=max(activations, touched),
        copies=weights + moments if config.asynchronous_checkpoints else 0.0,
    )


def _table_gradients(config: TrainConfig, sizes: ModelSizes, micro_tokens: float, sparse_tables: bool) -> float:
    """Numbers in the gradients of all tables, when most of them are there."""
    touched = sizes.touched(micro_tokens)
    num_passes = config.gradient_accumulation
    if not sparse_tables:  # that of this pass, and the sum of the passes before
        return sum(table.numbers for table in sizes.tables) * min(num_passes, 2)
    if num_passes == 1:  # on a CPU nothing is written out: the fused step sums each row when it updates it
        return 0.0 if config.device == "cpu" else touched
    return num_passes * touched + sizes.touched(num_passes * micro_tokens)  # kept side by side, then summed


def _exchanges(sizes: ModelSizes, num_ranks: int, num_shards: int, num_replicas: int, micro_tokens: float) -> Exchanges:
    """Of one micro-batch: FSDP2 gathers weights forward, those of the blocks again backward, and scatters gradients."""
    columns = replicas = 0.0
    for table in sizes.tables:
        columns += sum(column_bytes_of_token(table.retrieved, table.num_vectors, table.width, num_shards))
        pairs = num_shards * table.retrieved * (_ID_BYTES + table.num_vectors * _BYTES)
        replicas += (num_replicas - 1) * (pairs + _num_operands(table.num_vectors) * table.width * _BYTES)
    return Exchanges(
        dense_part=_BYTES * (num_ranks - 1) / num_ranks * (2 * sizes.dense(num_ranks) + sizes.of_blocks(num_ranks)),
        columns=columns * micro_tokens,
        replicas=replicas * micro_tokens,
    )


def _moved_bytes(
    config: TrainConfig, sizes: ModelSizes, num_ranks: int, num_shards: int, step_tokens: float, sparse_tables: bool
) -> float:
    """Between a device and its memory, in a step.

    Weights forward and backward; activations written and read, and their gradients; retrieved rows forward and
    backward; values and moments read and written by the optimiser, with the gradient.
    """
    dense = sizes.dense(num_ranks)
    moved = _BYTES * (2 * config.gradient_accumulation * dense + 8 * dense / num_ranks)
    moved += 4 * sizes.activation_bytes_of_token * step_tokens
    for table in sizes.tables:
        moved += 2 * _BYTES * step_tokens * table.retrieved * table.num_vectors * table.width
        share = table.touched_share(step_tokens * num_ranks) if sparse_tables else 1.0
        moved += 8 * _BYTES * share * table.numbers / num_shards
    return moved
