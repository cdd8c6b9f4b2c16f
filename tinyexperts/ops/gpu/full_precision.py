"""fp32 matrix products in full precision, whatever torch is set to: TF32 would change which experts are retrieved.

torch keeps the precision of matrix products on CUDA devices in a tree of settings of the process: "cuda/matmul"; where
that is "none" it is "cuda/all", and where this is "none" too "generic/all". Its older functions
(set_float32_matmul_precision, allow_tf32) write the first of them, and a number of their own which matrix products
don't look at. So the first one alone is changed here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MATMUL, _CUDA, _GENERIC = ("cuda", "matmul"), ("cuda", "all"), ("generic", "all")

_read = torch._C._get_fp32_precision_getter
_write = torch._C._set_fp32_precision_setter


class _Users:
    """The threads inside of full_precision: the first one changes the setting, the last one restores it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.number = 0
        self.setting_before: str | None = None


_users = _Users()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute fp32 matrix products on CUDA devices in fp32, in every thread, until the last user leaves.

    The setting that was there comes back exactly, whichever of torch's functions made it. Nothing waits for a device.
    """
    with _users.lock:
        if _users.number == 0:
            _users.setting_before = None
            if _read(*_MATMUL) == "tf32":
                _users.setting_before = _setting_that_shows_tf32()
                _write(*_MATMUL, "ieee")
        _users.number += 1
    try:
        yield
    finally:
        with _users.lock:
            _users.number -= 1
            if _users.number == 0 and _users.setting_before is not None:
                _write(*_MATMUL, _users.setting_before)


def _setting_that_shows_tf32() -> str:
    """Return what "cuda/matmul" is set to, "tf32" or "none": torch shows what it inherits in the same way."""
    generic = _read(*_GENERIC)
    try:
        _write(*_GENERIC, "ieee")
        if _read(*_MATMUL) != "tf32":
            return "none"  # it came from there
        if _read(*_CUDA) != "tf32":
            return "tf32"
        _write(*_CUDA, "ieee")
        try:
            return "tf32" if _read(*_MATMUL) == "tf32" else "none"
        finally:
            _write(*_CUDA, "tf32")
    finally:
        _write(*_GENERIC, generic)
