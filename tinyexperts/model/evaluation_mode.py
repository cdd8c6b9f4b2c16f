"""Evaluation mode for the length of a scope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; at the end each module gets its own mode back, whatever was raised."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, was_training in before:  # a parent before its children, whose mode it sets
            if module.training != was_training:
                module.train(was_training)
                module.training = was_training
