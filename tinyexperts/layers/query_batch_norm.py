"""Batch norm of the queries (Lample et al., arXiv 1907.05242): over real tokens, and over the tokens of all ranks.

In fp32 and fp64, without a mask and on one rank, it calls what torch.nn.BatchNorm1d calls, with the same arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers.recomputation import in_recomputation
from tinyexperts.ops.collectives import sum_over_ranks

AnyModule = TypeVar("AnyModule", bound=nn.Module)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def share_query_statistics(module: AnyModule, group: dist.ProcessGroup | None = None) -> AnyModule:
    """Let every query batch norm in `module` take its statistics over the tokens of all ranks of a process group.

    As torch.nn.SyncBatchNorm.convert_sync_batchnorm does for other batch norms: before or after the module is wrapped
    in DistributedDataParallel. In training all ranks call forward and backward passes together; each may have another
    number of tokens, or none. A copy.deepcopy of the module shares the group; pickling, as in torch.save, drops it,
    since a group belongs to the processes that made it: call this again on a module that was loaded.

    Args:
        module (nn.Module): a layer, or a model that has some in it.
        group (ProcessGroup | None): the processes; all of them (the default group) when None.

    Returns:
        The same module.

    Raises:
        InputError: no query batch norm in the module, no process group yet, or one that this process is not part of.
    """
    if group is None:
        if not dist.is_initialized():
            raise InputError(
                "without a group the statistics are shared by the default process group, of which there is none: call "
                "torch.distributed.init_process_group first"
            )
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):  # torch gives an integer to those outside a group
        raise InputError(f"group must be a process group of which this process is a member, got {group!r}")
    norms = [each for each in module.modules() if isinstance(each, QueryBatchNorm)]
    if not norms:
        name = type(module).__name__
        raise InputError(f"module must hold a query batch norm whose statistics can be shared, got {name}")
    for norm in norms:
        norm.statistics_group = group
    return module


class QueryBatchNorm(nn.BatchNorm1d):
    """Batch norm of the queries: batch statistics in training, running ones in evaluation.

    A norm is frozen when it has parameters and none of them requires a gradient, whatever the rest of the layer does.
    A frozen norm uses its running statistics in training too, and leaves them and their count as they are.

    Running statistics are of fp32 or wider: a cast to fewer bits, of the norm or of a module around it, leaves them as
    they are, and a checkpoint or default type of fewer bits is widened.

    A recomputed forward pass (activation checkpointing) leaves the running statistics alone, and so does an empty
    batch. With gradient accumulation every micro-batch is normalized by its own statistics and moves the running ones
    once. With a `statistics_group` (see share_query_statistics) the batch is that of all its ranks. Without running
    statistics (track_running_stats=False) the batch's own are used in evaluation too.
    """

    statistics_group: dist.ProcessGroup | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._widen_statistics()

    def _widen_statistics(self) -> None:
        for name in _STATISTICS:
            statistic = getattr(self, name)
            if statistic is not None and statistic.dtype.itemsize < 4:
                setattr(self, name, statistic.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QueryBatchNorm:
        """Keep the running statistics in a cast to fewer bits than fp32 has."""
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, statistic in before.items():
            if statistic is not None and getattr(self, name).dtype.itemsize < 4:
                setattr(self, name, statistic.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._widen_statistics()  # assign=True replaces them by the checkpoint's

    def __deepcopy__(self, memo: dict[int, Any]) -> QueryBatchNorm:
        """Copy all but the process group, which can't be copied: the copy shares it."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        if self.statistics_group is not None:
            memo[id(self.statistics_group)] = self.statistics_group
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the process group, which is nothing outside its processes."""
        return {name: value for name, value in self.__dict__.items() if name != "statistics_group"}

    @property
    def is_frozen(self) -> bool:
        """True if there are parameters, and none requires a gradient."""
        parameters = [parameter for parameter in (self.weight, self.bias) if parameter is not None]
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)

    def forward(self, query_MC: Tensor, mask_M: Tensor | None = None) -> Tensor:
        """Normalize queries by the batch's statistics, or by the running ones.

        Batch statistics are of the tokens that the mask keeps, and normalize all tokens. Fewer than two such tokens
        have no variance: then the running statistics are used, and do not move.

        Args:
            query_MC (float, [M, H*Q]): the queries.
            mask_M (bool, [M]): True for real tokens; None for all.

        Returns:
            normalized (dtype of the queries, [M, H*Q]).
        """
        mean, var = self.running_mean, self.running_var
        by_batch = mean is None or var is None or (self.training and not self.is_frozen)
        group = self.statistics_group if self.training else None
        if by_batch and (mask_M is not None or group is not None):
            return self._forward_of_real_tokens(query_MC, mask_M, group)
        if query_MC.shape[0] == 0:
            return query_MC
        momentum = 0.0
        if by_batch:
            if mean is None or var is None or not self.track_running_stats:
                mean, var = None, None
            elif in_recomputation():
                # Copies take the update, so that the same tensors are saved as in the first pass.
                mean, var = mean.clone(), var.clone()
            else:
                momentum = self._count_batch()
        # torch takes 16-bit queries with parameters and statistics of fp32, but not with one of these in 16 bits.
        dtype = torch.promote_types(query_MC.dtype, torch.float32) if mean is None else mean.dtype
        weight, bias = (None if each is None else each.to(dtype) for each in (self.weight, self.bias))
        query = query_MC.to(dtype) if dtype == torch.float64 else query_MC
        normed = F.batch_norm(query, mean, var, weight, bias, by_batch, momentum, self.eps)
        return normed.to(query_MC.dtype)

    def _count_batch(self) -> float:
        """Count a batch; return how far it moves the running statistics."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1 / float(self.num_batches_tracked)
        return self.momentum or 0.0

    def _forward_of_real_tokens(
        self, query_MC: Tensor, mask_M: Tensor | None, group: dist.ProcessGroup | None
    ) -> Tensor:
        """Normalize by the statistics of the tokens that the mask keeps, of all ranks of the group.

        Only the device knows how many these are: no branch depends on it, so that the graph is one, and static.
        """
        query = query_MC.to(torch.promote_types(query_MC.dtype, torch.float32))

        def sum_of_real(of_tokens: Tensor) -> Tensor:
            # Not by a product: padding may hold anything, and 0 * inf is NaN.
            return (of_tokens if mask_M is None else torch.where(mask_M[:, None], of_tokens, 0)).sum(0)

        count = query.new_full((), query.shape[0]) if mask_M is None else mask_M.sum().to(query.dtype)
        sums = torch.cat([sum_of_real(query), count[None]])
        sums = sums if group is None else sum_over_ranks(sums, group)
        count = sums[-1].detach()
        has_variance = count > 1
        tracked = None
        if self.running_mean is not None and self.running_var is not None:
            tracked = self.running_mean, self.running_var
        otherwise_mean, otherwise_var = (0.0, 1.0) if tracked is None else (t.to(query.dtype) for t in tracked)
        mean = torch.where(has_variance, sums[:-1] / count.clamp(min=1), otherwise_mean)
        centered = query - mean
        squares = sum_of_real(centered.square())
        squares = squares if group is None else sum_over_ranks(squares, group)
        variance = torch.where(has_variance, squares / count.clamp(min=1), otherwise_var)
        if tracked is not None and self.training and self.track_running_stats and not in_recomputation():
            self._move_statistics(*tracked, mean.detach(), variance.detach(), count)
        normed = centered * (variance + self.eps).rsqrt()
        normed = normed if self.weight is None else normed * self.weight
        normed = normed if self.bias is None else normed + self.bias
        return normed.to(query_MC.dtype)

    @torch.no_grad()
    def _move_statistics(
        self, running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, count: Tensor
    ) -> None:
        """Move the running statistics by a batch of `count` tokens, if that has a variance."""
        has_variance = count > 1
        momentum: Tensor | float = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(has_variance)
            if self.momentum is None:  # the mean of all batches
                momentum = self.num_batches_tracked.to(running_mean.dtype).clamp(min=1).reciprocal()
        weight = has_variance.to(running_mean.dtype) * momentum
        running_mean.lerp_(mean.to(running_mean.dtype), weight)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        running_var.lerp_(unbiased.to(running_var.dtype), weight)
