"""The recomputation of a forward pass for the backward pass (activation checkpointing)."""

from __future__ import annotations

import torch


def in_recomputation() -> bool:
    """Return True while autograd runs a backward pass: a forward pass must not move its statistics a second time."""
    # A traced graph gathers its statistics once, in its own forward part.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
