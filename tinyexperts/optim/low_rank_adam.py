"""Adam on a low-rank change of each matrix (LoRA, Hu et al. 2021, arXiv 2106.09685), which the matrix carries at once.

The matrix stays an ordinary parameter, so that checkpoints, compiled blocks and everything else know nothing of it:
after each step it is W + B A, and W, A, B and the moments are the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.errors import InputError, require_at_least


class LowRankAdam(torch.optim.Optimizer):
    """Adam on A [..., rank, in] and B [..., out, rank], of which W + B A is the parameter [..., out, in].

    A is drawn as in torch.nn.Linear and B is zero, so that nothing has changed before the first step; the product has
    no factor (alpha = rank). The state of a parameter is `step` (int64 scalar on the CPU), `origin` (W), `down` (A),
    `up` (B) and the two moments of each.

    Args:
        params (Iterable): parameters of at least two dimensions, or groups of them.
        rank (int): columns of B and rows of A.
        lr (float): learning rate, as in torch.optim.Adam.
        betas (tuple[float, float]): (beta1, beta2), as in torch.optim.Adam.
        eps (float): as in torch.optim.Adam.
        seed (int): the seed of A.

    Raises:
        InputError: a parameter of fewer than two dimensions, a rank below 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        rank: int,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        require_at_least(1, "rank", rank)
        super().__init__(params, {"rank": rank, "lr": lr, "betas": betas, "eps": eps, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not name take the optimizer's defaults.

        Raises:
            InputError: a parameter of fewer than two dimensions.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() < 2:
                raise InputError(
                    f"a low-rank change needs two dimensions or more, got a parameter of shape {list(parameter.shape)}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the result of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_first_state(parameter, group["rank"], (group["seed"], number)))
                state["step"] += 1
                down, up = state["down"], state["up"]
                # d(W + B A) = dB A + B dA
                gradients = {"down": up.mT @ parameter.grad, "up": parameter.grad @ down.mT}
                for name, gradient in gradients.items():
                    _adam_(state, name, gradient, lr=group["lr"], betas=group["betas"], eps=group["eps"])
                parameter.copy_(state["origin"] + up @ down)
        return loss


def _first_state(parameter: Tensor, rank: int, seeds: tuple[int, int]) -> dict[str, Tensor]:
    *several, out, width = parameter.shape
    # Of a sequence of both, so that no parameter of one seed draws as another of the next.
    (seed,) = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
    bound = width**-0.5
    down = torch.empty((*several, rank, width)).uniform_(-bound, bound, generator=generator).to(parameter)
    state = {
        "step": torch.zeros((), dtype=torch.int64),
        "origin": parameter.detach().clone(),
        "down": down,
        "up": parameter.new_zeros((*several, out, rank)),
    }
    for name in ("down", "up"):
        state |= {f"{name}_avg": torch.zeros_like(state[name]), f"{name}_avg_sq": torch.zeros_like(state[name])}
    return state


def _adam_(
    state: dict[str, Tensor], name: str, gradient: Tensor, *, lr: float, betas: tuple[float, float], eps: float
) -> None:
    """Update one factor in place, as torch.optim.Adam does."""
    step, (beta1, beta2) = int(state["step"]), betas
    average, of_squares = state[f"{name}_avg"], state[f"{name}_avg_sq"]
    average.lerp_(gradient, 1 - beta1)
    of_squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (of_squares / (1 - beta2**step)).sqrt_().add_(eps)
    state[name].addcdiv_(average, denominator, value=-lr / (1 - beta1**step))
