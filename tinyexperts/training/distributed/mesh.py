"""The mesh (replicate, table): ranks of a row share each table by its columns, ranks of a column hold the same."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tinyexperts.errors import InputError
from tinyexperts.layers.product_key_layer import MIN_COLUMNS
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.distributed.ranks import Ranks


def with_mesh(ranks: Ranks, shape: tuple[int, int], device_type: str) -> Ranks:
    """Return the ranks with the groups of a mesh of this shape (replicate, table)."""
    # By hand: the groups that init_device_mesh makes wait half an hour, whatever the others' time-out.
    places = torch.arange(ranks.size, device="cpu").view(shape)
    columns, _ = dist.new_subgroups_by_enumeration(places.tolist(), timeout=ranks.timeout)  # type: ignore[no-untyped-call]
    replicas, _ = dist.new_subgroups_by_enumeration(places.T.tolist(), timeout=ranks.timeout)  # type: ignore[no-untyped-call]
    mesh = DeviceMesh.from_group([replicas, columns], device_type, mesh=places, mesh_dim_names=("replicate", "table"))
    assert ranks.groups is not None
    groups = replace(ranks.groups, column_ranks=columns, replica_ranks=replicas if shape[0] > 1 else None)
    return replace(ranks, groups=groups, mesh=mesh)


def mesh_shape(config: TrainConfig, size: int) -> tuple[int, int]:
    """Return (replicate, table): as configured, or with the largest table group of a node that the width allows.

    Args:
        config (TrainConfig): the configuration.
        size (int): the number of ranks.

    Raises:
        InputError: the configured mesh does not multiply up to `size`.
    """
    mesh = config.distributed.mesh
    if mesh is not None:
        if math.prod(mesh) != size:
            raise InputError(
                f"distributed.mesh must multiply up to the number of ranks, {size}, got {mesh[0]} x {mesh[1]} "
                "(torchrun --nproc-per-node starts several)"
            )
        return mesh
    if config.optimizer.table_second_moment == "row":  # a mean over all columns
        return size, 1
    width, of_node = config.model.d_model, int(os.environ.get("LOCAL_WORLD_SIZE", size))
    fitting = [
        shards
        for shards in range(2, of_node + 1)
        if size % shards == of_node % shards == width % shards == 0 and width // shards >= MIN_COLUMNS
    ]
    num_shards = max(fitting, default=1)
    return size // num_shards, num_shards
