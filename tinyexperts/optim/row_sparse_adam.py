"""Adam for tables with sparse gradients: a step costs what its touched rows cost, whatever the size of the table.

Must match torch.optim.SparseAdam. Unlike it, the state is not even zeroed row by row: memory is taken from the
operating system as rows are touched. Tables want a learning rate of their own and no weight decay (arXiv 1907.05242);
the defaults, 1e-2 with (0.9, 0.99), are those that did best in this project's first runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.row_adam import row_adam_
from tinyexperts.optim.sparse_gradients import rows_and_values

_MOMENTS = ("exp_avg", "exp_avg_sq")


class RowSparseAdam(torch.optim.Optimizer):
    """Adam on the rows that have a gradient; rows without one keep their value and their moments.

    params: parameters with sparse_coo gradients of one sparse dimension, or groups of them; `lr` may differ by group
    lr, betas, eps: as in torch.optim.Adam

    The state of a parameter is `step` (int64 scalar on the CPU, number of steps), `exp_avg` and `exp_avg_sq` (of the
    parameter's shape; fp32 where the parameter is bf16 or fp16).

    Raises InputError for a negative lr or eps, and for betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options it does not name take the optimiser's defaults."""
        options = {**self.defaults, **param_group}
        if not options["lr"] >= 0:
            raise InputError(f"lr must not be negative, got {options['lr']}")
        if not options["eps"] >= 0:
            raise InputError(f"eps must not be negative, got {options['eps']}")
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise InputError(f"betas must be at least 0 and less than 1, got {options['betas']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every row that has a gradient; returns what `closure` returns.

        Raises InputError where a gradient is dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.layout != torch.sparse_coo:
                    raise InputError(
                        f"RowSparseAdam needs sparse gradients, got a dense one of shape {list(parameter.shape)}: "
                        "use AdamW, or make the layer with PEER(sparse=True)"
                    )
                state = self.state[parameter]
                if not state:
                    state.update(_zero_state(parameter))
                state["step"] += 1
                rows, values = rows_and_values(parameter.grad)
                row_adam_(
                    parameter,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    rows,
                    values,
                    learning_rate=float(group["lr"]),
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    step=int(state["step"]),
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, as any torch optimiser does."""
        super().load_state_dict(state_dict)
        # torch casts a state to its parameter's type, which would round the fp32 moments of a bf16 table.
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            if parameter.dtype != _state_dtype(parameter) and saved_id in state_dict["state"]:
                for name in _MOMENTS:
                    moment = state_dict["state"][saved_id][name]
                    self.state[parameter][name] = moment.to(parameter.device, _state_dtype(parameter))


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _zero_state(parameter: Tensor) -> dict[str, Tensor]:
    state = {name: _lazy_zeros(parameter.shape, _state_dtype(parameter), parameter.device) for name in _MOMENTS}
    return {"step": torch.zeros((), dtype=torch.int64), **state}


def _lazy_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU cost memory only where touched: torch.zeros writes them all, numpy's calloc does not."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(tuple(shape), dtype=np.float64 if dtype == torch.float64 else np.float32))
