"""A scope in which backward passes defer a table's gradient, for a step that sums each row when it updates it.

The gradient is in `.grad` as usual, as a tensor (`DeferredGradient`) that holds the parts it is made of. Only
RowSparseAdam and clip_gradient_norm_ read these, and any other use writes it out as the sparse_coo gradient that it is.
So everything that reads or empties `.grad` (zero_grad, accumulation, other optimizers, torch.amp.GradScaler) works as
outside the scope. Autograd's engine knows if a pass wants the table's gradient at all.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map_only

from tinyexperts.errors import InputError
from tinyexperts.ops.cpu.compile import CPU_KERNELS_RUN
from tinyexperts.ops.expert_mlp.row_sums import sparse_gradient
from tinyexperts.ops.expert_mlp.table_gradient import TableGradient
from tinyexperts.ops.expert_mlp.table_gradient_gpu import GpuTableGradient, supports_deferred_on_gpu

# The name of the tables of the scopes that this thread is in. torch keeps them: a backward pass on the CPU runs in the
# thread that calls it, one on a GPU in a thread of the engine, which gets torch's objects of the calling thread.
_DEFERRING = "tinyexperts_deferring"

# Tables on the CPU that row_adam/fused.py updates.
_CPU_TYPES = (torch.float32, torch.float64, torch.bfloat16)


class DeferredGradient(Tensor):
    """The gradient of a table [N, E, D] (sparse_coo, of the table's type), written out at its first use as a tensor."""

    def __new__(cls, table: Tensor, pending: TableGradient | GpuTableGradient) -> DeferredGradient:
        return Tensor._make_wrapper_subclass(
            cls, table.shape, dtype=table.dtype, device=table.device, layout=torch.sparse_coo
        )

    def __init__(self, table: Tensor, pending: TableGradient | GpuTableGradient) -> None:
        self.pending: TableGradient | GpuTableGradient | None = pending
        """The gradient in deferred form; None once it has been written out."""
        self._written: Tensor | None = None

    def written(self) -> Tensor:
        """Return the gradient as a sparse_coo tensor of the touched rows, the same one at each call."""
        if self._written is None:
            assert self.pending is not None
            rows, values = self.pending.rows_and_values()
            self._written = sparse_gradient(rows, values.to(self.dtype), self.shape)
            self.pending = None
        return self._written

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(DeferredGradient, DeferredGradient.written, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.written())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.written(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.written().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def pending_gradient(gradient: Tensor) -> TableGradient | GpuTableGradient | None:
    """Return a gradient's deferred form; None where it is, or has been, written out."""
    return gradient.pending if isinstance(gradient, DeferredGradient) else None


def supports_deferred(table: Tensor) -> bool:
    """Return True for tables whose rows a step can sum: contiguous ones that there are kernels for.

    On the CPU these are of fp32, fp64 or bf16, on CUDA devices of fp32, bf16 or fp16.
    """
    if table.device.type == "cuda":
        return supports_deferred_on_gpu(table)
    has_kernels = table.device.type == "cpu" and CPU_KERNELS_RUN
    return has_kernels and table.dtype in _CPU_TYPES and table.is_contiguous()


@contextmanager
def deferred_table_gradients(tables: Iterable[Tensor]) -> Iterator[None]:
    """Make backward passes in the scope store the gradients of these tables in deferred form in `.grad`.

    Args:
        tables (Iterable[Tensor]): parameters that `supports_deferred` accepts.

    Raises:
        InputError: a table that is no leaf, that `supports_deferred` refuses, or that has a hook.
    """
    tables = tuple(tables)
    for table in tables:
        if not supports_deferred(table) or not table.is_leaf:
            raise InputError(
                "gradients are deferred for tables that are contiguous leaves on the CPU in fp32, fp64 or bf16, or on "
                f"a CUDA device with Triton's kernels, got {table.dtype} on {table.device.type}"
            )
        _check_hooks(table)
    before = _deferring()
    torch._C._stash_obj_in_tls(_DEFERRING, before + tables)
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_DEFERRING, before)


def _deferring() -> tuple[Tensor, ...]:
    if not torch._C._is_key_in_tls(_DEFERRING):
        return ()
    tables: tuple[Tensor, ...] = torch._C._get_obj_in_tls(_DEFERRING)
    return tables


def find_deferring_table(reference: weakref.ref[Tensor], gradient_dtype: torch.dtype, *, sparse: bool) -> Tensor | None:
    """Return the table whose gradient the running backward pass must defer; None if it must not.

    Args:
        reference (weakref.ref): the table that the forward pass used.
        gradient_dtype (torch.dtype): the type of the sums.
        sparse (bool): True if the layer's gradient is sparse.

    Raises:
        InputError: a layer whose gradient is dense, or a hook that wants the gradient.
    """
    tables = _deferring()
    if not tables:
        return None
    table = reference()
    if table is None or not any(table is each for each in tables) or not table.requires_grad:
        return None
    # Sums of another type than the step's (fp64 tokens, an fp32 table) are rounded when they are written out.
    if (
        gradient_dtype != torch.promote_types(table.dtype, torch.float32)
        or torch.is_grad_enabled()
        or not _accumulates(table)
    ):
        return None
    if not sparse:
        raise InputError("a deferred gradient is sparse, and the layer's gradient is dense: make it with sparse=True")
    _check_hooks(table)
    return table


def defer_gradient(table: Tensor, pending: TableGradient | GpuTableGradient) -> None:
    """Accumulate a gradient in `.grad`; where there is none yet it stays in deferred form."""
    gradient = DeferredGradient(table, pending)
    if table.grad is None:
        table.grad = gradient
    else:
        table.grad += gradient  # in place, as autograd accumulates


def _accumulates(table: Tensor) -> bool:
    """Return True if the running backward pass adds to the table's `.grad`: not where it is for other inputs alone."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(table).node)
    except RuntimeError:  # autograd.grad returns the table's gradient, and adds it to nothing
        return False


def _check_hooks(table: Tensor) -> None:
    if table._backward_hooks or getattr(table, "_post_accumulate_grad_hooks", None):
        raise InputError("a deferred gradient passes no hook, and the table has one: make the backward pass outside")
