"""Adam for tables with sparse gradients: a step costs what its touched rows cost, whatever the size of the table.

It must match torch.optim.SparseAdam, unless an option says otherwise. In contrast to it the state costs memory only for
touched rows: the operating system gives it as they are touched. Tables want a learning rate of their own and no weight
decay (arXiv 1907.05242); the defaults, 1e-2 with (0.9, 0.99), did best in this project's first runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyexperts.errors import InputError
from tinyexperts.ops.cpu.huge_pages import prefer_huge_pages
from tinyexperts.ops.expert_mlp.columns import ColumnShard
from tinyexperts.ops.expert_mlp.deferred import deferred_table_gradients, pending_gradient, supports_deferred
from tinyexperts.ops.row_adam import row_adam_
from tinyexperts.ops.row_adam.fused import row_adam_fused_
from tinyexperts.ops.row_adam.rounding import NUM_SEEDS, seed_of_step
from tinyexperts.optim.sparse_gradients import rows_and_values

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SECOND_MOMENTS = ("element", "row")


class RowSparseAdam(torch.optim.Optimizer):
    """Adam on the rows that have a gradient; rows without one keep their value and their moments.

    The state of a parameter [N, ..., D] is `step` (int64 scalar on the CPU, number of steps), `exp_avg` (of the
    parameter's shape) and `exp_avg_sq` (of the parameter's shape; with "row" [N, ...], without D), both fp32 where the
    parameter is bf16 or fp16.

    Args:
        params (Iterable): parameters with sparse_coo gradients of one sparse dimension, or groups of them; every option
            below may differ by group.
        lr (float): learning rate, as in torch.optim.SparseAdam.
        betas (tuple[float, float]): (beta1, beta2), as in torch.optim.SparseAdam.
        eps (float): as in torch.optim.SparseAdam: it is added before the bias correction.
        weight_decay (float): decoupled, as in torch.optim.AdamW, but of touched rows only: before the step their values
            shrink by lr * weight_decay of themselves.
        second_moment (str): "element", a number an element, as in Adam; "row", one for the D elements of a vector, the
            running mean over steps of the mean over D of the squared gradient. "row" nearly halves the state.
        fused (bool): backward passes in `deferred_gradients([optimizer])` keep each table's gradient as the pairs that
            it is made of, and `step` sums a row when it updates it, so that the gradient is never written out. It is
            for tables on the CPU in fp32 or fp64, where it equals the step without it to the bit, for those in bf16,
            whose gradient it sums and uses in fp32, and for those on a CUDA device with Triton's kernels. It changes
            nothing outside that scope.
        stochastic_rounding (bool): a step rounds the values of bf16 tables up or down at random, so that their mean
            stays, where rounding to nearest would forget most small steps (ops/row_adam/rounding.py).
        seed (int): of the random numbers, 0 <= seed < 2^32. They also depend on the number of the parameter in the
            optimizer, the step and the element's place alone: a run that goes on from a saved state has the same bits.

    Raises:
        InputError: a negative lr, eps or weight_decay, betas outside [0, 1), another second_moment, "row" for a table
            shared by columns over ranks, fused for a table elsewhere or of another type, stochastic_rounding for one
            that is not bf16, a seed outside of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        second_moment: str = "element",
        fused: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": second_moment,
            "fused": fused,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not name take the optimizer's defaults.

        Raises:
            InputError: an option or a table that the class refuses.
        """
        options = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            if not options[name] >= 0:
                raise InputError(f"{name} must not be negative, got {options[name]}")
        if options["second_moment"] not in _SECOND_MOMENTS:
            raise InputError(f'second_moment must be "element" or "row", got {options["second_moment"]!r}')
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise InputError(f"betas must be at least 0 and less than 1, got {options['betas']}")
        if not 0 <= options["seed"] < NUM_SEEDS:
            raise InputError(f"seed must be at least 0 and less than 2^32, got {options['seed']}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["second_moment"] == "row" and any(isinstance(table, ColumnShard) for table in group["params"]):
            raise InputError(
                'second_moment "row" is a mean over D, and a table shared by columns holds a part of D: use "element"'
            )
        for table in group["params"] if group["fused"] else ():
            if not supports_deferred(table):
                raise InputError(
                    "fused is for contiguous tables on the CPU in fp32, fp64 or bf16, or on a CUDA device with "
                    f"Triton's kernels, got {table.dtype} on {table.device.type}"
                )
        for table in group["params"] if group["stochastic_rounding"] else ():
            if table.dtype != torch.bfloat16:
                raise InputError(f"stochastic_rounding is for bf16 tables, got one of {table.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every row that has a gradient; return the result of `closure`.

        Raises:
            InputError: a dense gradient, or a parameter of one dimension with second_moment "row".
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbers = itertools.count()
        for group in self.param_groups:
            for parameter, number in zip(group["params"], numbers, strict=False):
                if parameter.grad is None:
                    continue
                if parameter.grad.layout != torch.sparse_coo:
                    raise InputError(
                        f"RowSparseAdam needs sparse gradients, got a dense one of shape {list(parameter.shape)}: "
                        "use AdamW, or make the layer with PEER(sparse=True)"
                    )
                state = self.state[parameter]
                if not state:
                    state.update(_zero_state(parameter, group["second_moment"]))
                state["step"] += 1
                step = int(state["step"])
                rounding_seed = seed_of_step(group["seed"], number, step) if group["stochastic_rounding"] else None
                tables = parameter, state["exp_avg"], state["exp_avg_sq"]
                options = {
                    "learning_rate": float(group["lr"]),
                    "beta1": group["betas"][0],
                    "beta2": group["betas"][1],
                    "eps": group["eps"],
                    "weight_decay": group["weight_decay"],
                    "step": step,
                    "rounding_seed": rounding_seed,
                }
                if (pairs := pending_gradient(parameter.grad)) is not None:
                    row_adam_fused_(*tables, pairs, **options)
                else:
                    row_adam_(*tables, *rows_and_values(parameter.grad), **options)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, which may be one of before the options of rounding."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("stochastic_rounding", False)
            group.setdefault("seed", 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict()`; `fused`, which depends on the tables' device, stays as it was made."""
        fused = [group["fused"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, fused, strict=True):
            group["fused"] = own
        # torch casts a state to its parameter's type, which would round the fp32 moments of a bf16 table.
        saved_ids = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            if parameter.dtype != _state_dtype(parameter) and saved_id in state_dict["state"]:
                for name in _MOMENTS:
                    moment = state_dict["state"][saved_id][name]
                    self.state[parameter][name] = moment.to(parameter.device, _state_dtype(parameter))


@contextmanager
def deferred_gradients(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Open a scope whose backward passes defer the gradients of the tables of `RowSparseAdam(fused=True)`.

    with deferred_gradients(optimizers):
        loss.backward()

    In the scope these tables get a `.grad` that is not written out: a sparse_coo tensor that holds the parts it is made
    of. `step` and `clip_gradient_norm_` read these; anything else that uses the gradient, in the scope or after it,
    writes it out, and finds the same numbers. A second backward pass writes out the sum. The scope has no effect on
    gradients that are returned (`torch.autograd.grad`), on those that a graph of torch.compile computes, and on
    backward passes of other threads.

    Args:
        optimizers (Iterable[Optimizer]): any; those that are no RowSparseAdam with fused=True are ignored.

    Raises:
        InputError: one of these tables has a hook, which would see no gradient; in the backward pass, a layer made
            without sparse=True.
    """
    fused = (
        group
        for optimizer in optimizers
        if isinstance(optimizer, RowSparseAdam)
        for group in optimizer.param_groups
        if group["fused"]
    )
    with deferred_table_gradients(table for group in fused for table in group["params"]):
        yield


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _zero_state(parameter: Tensor, second_moment: str) -> dict[str, Tensor]:
    if second_moment == "row" and parameter.dim() < 2:
        raise InputError(
            f'second_moment "row" needs a parameter [N, ..., D] of at least two dimensions, got {list(parameter.shape)}'
        )
    shapes = (parameter.shape, parameter.shape[:-1] if second_moment == "row" else parameter.shape)
    state = {
        name: _lazy_zeros(shape, _state_dtype(parameter), parameter.device)
        for name, shape in zip(_MOMENTS, shapes, strict=True)
    }
    return {"step": torch.zeros((), dtype=torch.int64, device="cpu"), **state}


def _lazy_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that cost a CPU memory only where touched: torch.zeros writes them all, numpy's calloc does not."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    zeros = np.zeros(tuple(shape), dtype=np.float64 if dtype == torch.float64 else np.float32)
    return prefer_huge_pages(torch.from_numpy(zeros))
