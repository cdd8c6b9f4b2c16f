"""The distribution of a model over ranks: tables by columns, as the layers make them, all else by FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from tinyexperts.model import Transformer
from tinyexperts.ops.expert_mlp.columns import ColumnShard
from tinyexperts.optim import split_parameters
from tinyexperts.training.distributed.ranks import Ranks


def shard_dense_part(model: Transformer, ranks: Ranks) -> None:
    """Put all parameters but the tables under FSDP2, over all ranks; gradients are summed over them."""
    assert ranks.mesh is not None
    assert ranks.groups is not None
    mesh = DeviceMesh.from_group(ranks.groups.all_ranks, ranks.mesh.device_type, mesh_dim_names=("rank",))
    # Sparse gradients do not pass fully_shard, and the layers have summed those of the tables already.
    tables = set(split_parameters(model).tables.values())
    for module in (*model.blocks, model):
        fully_shard(
            module,
            mesh=mesh,
            ignored_params=tables,
            shard_placement_fn=lambda parameter: Shard(sharded_dimension(parameter.shape, ranks.size)),
        )
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def sharded_dimension(shape: torch.Size, num_ranks: int) -> int:
    """Return the dimension of a parameter that is cut into parts: the first, unless it is shorter than their number.

    FSDP2 would fill up sub-keys [2, sqrt(N), K] to as many rows as ranks. It cuts evenly in other dimensions alone.
    """
    even = (dimension for dimension, size in enumerate(shape) if size % num_ranks == 0)
    return 0 if shape[0] >= num_ranks else next(even, 0)


def reshard_after_eval(model: Transformer) -> None:
    """Share out the weights again after forward passes without backward ones: FSDP2 would keep the outermost whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def as_part(tensor: Tensor, parameter: Tensor, ranks: Ranks) -> Tensor:
    """Return a parameter, or a part of its optimizer's state, as a DTensor if it is a part of a whole.

    Args:
        tensor (Tensor): the parameter, or a tensor of its optimizer's state.
        parameter (Tensor): the parameter.
        ranks (Ranks): the ranks that share it.
    """
    if not isinstance(parameter, ColumnShard) or tensor.shape != parameter.shape:
        return tensor
    placements = [Replicate(), Shard(tensor.dim() - 1)]
    part: Tensor = DTensor.from_local(tensor, ranks.mesh, placements, run_check=False)
    return part


def local(tensor: Tensor) -> Tensor:
    """Return this rank's local shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
