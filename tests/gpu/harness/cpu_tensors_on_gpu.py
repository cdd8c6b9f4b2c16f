"""The operators' tests as they are, on a GPU: operands that lie on the CPU go there, and what comes out comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch.utils._pytree import tree_map_only

import tinyexperts.ops  # noqa: F401  # defines the operators


@contextmanager
def cpu_tensors_on_gpu(device: str = "cuda") -> Iterator[None]:
    """Let operators on CPU tensors run on a device what they run for tensors there."""
    ours = [operator for name, operator in OPDEFS.items() if name.startswith("tinyexperts::")]
    before = {}
    for operator in ours:
        if {"cpu", "cuda"} <= operator._backend_fns.keys():
            before[operator] = operator._backend_fns["cpu"]
            operator._backend_fns["cpu"] = _there_and_back(operator, device)
    try:
        yield
    finally:
        for operator, function in before.items():
            operator._backend_fns["cpu"] = function


def _there_and_back(operator: CustomOpDef, device: str) -> Callable[..., Any]:
    function = operator._backend_fns["cuda"]
    changes = [argument.alias_info is not None for argument in operator._opoverload._schema.arguments]

    def call(*arguments: Any) -> Any:
        # A copy that keeps the strides: kernels are to meet what the test made.
        there = tree_map_only(Tensor, lambda tensor: tensor.to(device, copy=True), arguments)
        outputs = function(*there)
        for argument, changed, is_changed in zip(arguments, there, changes, strict=False):
            if is_changed:
                argument.copy_(changed)
        return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), outputs)

    return call
