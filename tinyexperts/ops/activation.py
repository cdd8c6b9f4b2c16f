"""The activations that the layers share, each with its derivative for the operators' hand-written backward passes.

The paper says "such as ReLU or GELU"; GELU is the exact one (erf), as torch's default. ReLU^2 is So et al. 2021
(arXiv 2109.08668).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.errors import InputError

Activation = Literal["gelu", "relu", "relu2", "silu"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
}

# torch.autograd.grad can't run inside an operator, but aten's own derivative kernels can.
_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda h: torch.ops.aten.gelu_backward(torch.ones_like(h), h),
    "relu": lambda h: (h > 0).to(h.dtype),
    "relu2": lambda h: 2 * F.relu(h),
    "silu": lambda h: torch.ops.aten.silu_backward(torch.ones_like(h), h),
}


def check_activation(activation: str) -> None:
    """Raise InputError unless `activation` is one of the shared ones."""
    if activation not in get_args(Activation):
        raise InputError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")


def activate(h: Tensor, activation: str) -> Tensor:
    """Return act(h), element by element."""
    return _FUNCTIONS[activation](h)


def activation_derivative(h: Tensor, activation: str) -> Tensor:
    """Return act'(h), element by element (0 at the kink of ReLU, as in torch)."""
    return _DERIVATIVES[activation](h)
