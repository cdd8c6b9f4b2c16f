"""Optimization: Adam on touched rows, clipping, the split of a model's parameters, and learning-rate schedules."""

from tinyexperts.optim.gradient_clipping import clip_gradient_norm_
from tinyexperts.optim.low_rank_adam import LowRankAdam
from tinyexperts.optim.parameter_groups import (
    ParameterKinds,
    build_optimizers,
    expected_touched_share,
    scale_learning_rates,
    split_parameters,
)
from tinyexperts.optim.row_sparse_adam import RowSparseAdam, deferred_gradients
from tinyexperts.optim.schedules import cosine, warmup_stable_decay
from tinyexperts.optim.sparse_gradients import rows_and_values

__all__ = [
    "LowRankAdam",
    "ParameterKinds",
    "RowSparseAdam",
    "build_optimizers",
    "clip_gradient_norm_",
    "cosine",
    "deferred_gradients",
    "expected_touched_share",
    "rows_and_values",
    "scale_learning_rates",
    "split_parameters",
    "warmup_stable_decay",
]
