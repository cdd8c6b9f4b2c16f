"""Kernels' memory accesses under TRITON_INTERPRET=1, checked as compute-sanitizer does it on a GPU.

- Each address of a load or store lies in the memory of a tensor that the launch was given.
- No program of a launch stores where another one loads or stores: a GPU runs them in any order, the interpreter one
  after the other.
- Within a program, what was stored is loaded or stored again only after tl.debug_barrier(): another thread may have
  stored it. (A load before the store is not checked: it is right where each thread stores what it has loaded.)
- One store has each address once.
- What tl.multiple_of, tl.max_contiguous and tl.max_constancy promise to the compiler holds.
- Atomics are refused: the order of their sums is not the same twice.

What it can't see: layouts, threads and caches; the code that a compiler makes of a kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from triton.runtime import interpreter

_call = interpreter.GridExecutor.__call__
_load = interpreter.InterpreterBuilder.create_masked_load
_store = interpreter.InterpreterBuilder.create_masked_store
_barrier = interpreter.InterpreterBuilder.create_barrier
_set_attr = interpreter.TensorHandle.set_attr

launched: list[str] = []
"""The names of the kernels that were launched, in order; a fixture empties it for each test."""


class Fault(BaseException):
    """What is wrong with a kernel.

    No Exception: those of a kernel are wrapped by the interpreter, and the operators' own check of a kernel takes them
    for a reason to run plain torch.
    """


@dataclass
class _Access:
    program: tuple[int, ...]
    is_store: bool
    size: int
    addresses: np.ndarray


@dataclass
class _Launch:
    kernel: str
    names: list[str]
    starts: np.ndarray
    """The first address of each storage, ascending."""
    stops: np.ndarray
    accesses: list[_Access] = field(default_factory=list)
    program: tuple[int, ...] = ()
    since_barrier: list[np.ndarray] = field(default_factory=list)
    """The addresses that `program` has stored to since its last barrier."""

    def fault(self, what: str) -> Fault:
        return Fault(f"kernel {self.kernel}: {what}")

    def place(self, address: int, size: int) -> str:
        number = int(np.searchsorted(self.starts, address, side="right")) - 1
        if number < 0:
            return f"{address:#x}"
        return f"element {(address - int(self.starts[number])) / size:g} of {self.names[number]}'s memory"


_current: _Launch | None = None


def install() -> None:
    """Check all launches of this process from now on."""
    interpreter.GridExecutor.__call__ = _checked_call
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load, builder.create_masked_store = _checked_load, _checked_store
    builder.create_barrier = _counted_barrier
    builder.create_atomic_rmw = builder.create_atomic_cas = _refuse_atomic
    interpreter.TensorHandle.set_attr = _checked_promise


def _checked_call(self, *arguments, **options):
    global _current
    named = {name: value for name, value in options.items() if name in self.arg_names}
    bound = inspect.signature(self.fn).bind(*arguments, **named).arguments
    storages: dict[int, tuple[int, str]] = {}
    for name, tensor in _tensors(bound):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            start = storage.data_ptr()
            names = f"{storages[start][1]}, {name}" if start in storages else name
            storages[start] = (start + storage.nbytes(), names)
    starts = sorted(storages)
    launch = _Launch(
        self.fn.__name__,
        [storages[start][1] for start in starts],
        np.array(starts, dtype=np.int64),
        np.array([storages[start][0] for start in starts], dtype=np.int64),
    )
    launched.append(launch.kernel)
    _current = launch
    try:
        result = _call(self, *arguments, **options)
    finally:
        _current = None
    _find_races(launch)
    return result


def _tensors(arguments: dict[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from _tensors({f"{name}[{number}]": each for number, each in enumerate(value)})
        elif hasattr(value, "base"):  # a TensorDescriptor
            yield name, value.base


def _checked_load(self, pointers, mask, *rest, **options):
    if _current is not None:
        access = _access(self, pointers, mask, is_store=False)
        _refuse_without_barrier(access)
        _current.accesses.append(access)
    return _load(self, pointers, mask, *rest, **options)


def _checked_store(self, pointers, value, mask, *rest, **options):
    if _current is not None:
        access = _access(self, pointers, mask, is_store=True)
        if len(np.unique(access.addresses)) != len(access.addresses):
            raise _current.fault(f"a store of program {access.program} has an address twice")
        _refuse_without_barrier(access)
        _current.accesses.append(access)
        _current.since_barrier.append(access.addresses)
    return _store(self, pointers, value, mask, *rest, **options)


def _counted_barrier(self, *arguments, **options):
    if _current is not None:
        _current.since_barrier.clear()
    return _barrier(self, *arguments, **options)


def _refuse_atomic(self, *arguments, **options):
    raise Fault("an atomic operation: the order of its sums is not the same twice, and these checks don't cover it")


def _access(builder, pointers, mask, *, is_store: bool) -> _Access:
    """Return the addresses that the mask lets through, inside of the launch's memory."""
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    chosen = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape).astype(bool)].astype(np.int64)
    number = np.searchsorted(_current.starts, chosen, side="right") - 1
    inside = np.zeros(len(chosen), dtype=bool)
    if len(_current.starts):
        inside = (number >= 0) & (chosen + size <= _current.stops[number])
    if not inside.all():
        place = _current.place(int(chosen[~inside][0]), size)
        what = "stores" if is_store else "loads"
        raise _current.fault(f"program {builder.grid_idx} {what} outside of the launch's tensors, at {place}")
    return _Access(builder.grid_idx, is_store, size, chosen)


def _refuse_without_barrier(access: _Access) -> None:
    if access.program != _current.program:
        _current.program = access.program
        _current.since_barrier.clear()
    if not _current.since_barrier:
        return
    again = access.addresses[np.isin(access.addresses, np.concatenate(_current.since_barrier))]
    if len(again):
        what = "stores to" if access.is_store else "loads"
        place = _current.place(int(again[0]), access.size)
        raise _current.fault(f"program {access.program} {what} {place}, which it has stored with no barrier between")


def _find_races(launch: _Launch) -> None:
    """Raise a Fault for memory that one program has stored to and another has used."""
    stored = [access.addresses for access in launch.accesses if access.is_store and len(access.addresses)]
    if not stored:
        return
    storages = np.unique(np.searchsorted(launch.starts, np.concatenate(stored), side="right"))
    relevant = []
    for access in launch.accesses:
        number = np.searchsorted(launch.starts, access.addresses, side="right")
        addresses = access.addresses[np.isin(number, storages)]
        if len(addresses):
            relevant.append(_Access(access.program, access.is_store, access.size, addresses))
    cell = min(access.size for access in relevant)  # bytes that no access divides
    programs = {program: number for number, program in enumerate(dict.fromkeys(a.program for a in relevant))}
    cells, users, stores = [], [], []
    for access in relevant:
        each = (access.addresses[:, None] + np.arange(0, access.size, cell)).ravel()
        cells.append(each)
        users.append(np.full(len(each), programs[access.program]))
        stores.append(np.full(len(each), access.is_store))
    all_cells, all_users, all_stores = map(np.concatenate, (cells, users, stores))
    order = np.argsort(all_cells, kind="stable")
    all_cells, all_users, all_stores = all_cells[order], all_users[order], all_stores[order]
    first = np.flatnonzero(np.r_[True, all_cells[1:] != all_cells[:-1]])
    is_shared = np.minimum.reduceat(all_users, first) != np.maximum.reduceat(all_users, first)
    races = np.flatnonzero(is_shared & np.logical_or.reduceat(all_stores, first))
    if not len(races):
        return
    start = first[races[0]]
    stop = first[races[0] + 1] if races[0] + 1 < len(first) else len(all_cells)
    names = list(programs)
    writer = int(all_users[start:stop][all_stores[start:stop]][0])
    other = int(np.flatnonzero(all_users[start:stop] != writer)[0]) + start
    what = "stores to" if all_stores[other] else "loads"
    raise launch.fault(
        f"program {names[writer]} stores to {launch.place(int(all_cells[start]), cell)}, "
        f"and program {names[all_users[other]]} {what} it in the same launch"
    )


def _checked_promise(self, key, values):
    """Check what a kernel promises: along each dimension, of each group of so many elements."""
    data = self.data.astype(np.int64) if self.data.dtype.kind in "iu" else self.data
    for axis, value in enumerate(values[: data.ndim]):
        if key == "tt.divisibility":
            kept = not (data.take(0, axis) % value).any() if data.shape[axis] else True
        else:
            groups = np.moveaxis(data, axis, -1)
            width = min(value, groups.shape[-1])
            groups = groups[..., : groups.shape[-1] // width * width].reshape(-1, width)
            step = np.arange(width) if key == "tt.contiguity" else 0
            kept = bool((groups == groups[:, :1] + step).all())
        if not kept:
            kernel = "" if _current is None else f"kernel {_current.kernel}: "
            raise Fault(f"{kernel}a tensor is promised to have {key} {value} along axis {axis}, and has not")
    return _set_attr(self, key, values)
