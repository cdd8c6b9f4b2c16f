"""Huge pages for large tables on Linux: random rows of a table cost 1.5 times as much where each needs a page walk."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_ADVICE_HUGE_PAGE = 14  # MADV_HUGEPAGE of linux/mman.h; Python names it from 3.8 on, on Linux only
_LEAST_BYTES = 1 << 24


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux for huge pages behind a tensor that has not been written yet; return the tensor."""
    num_bytes = tensor.numel() * tensor.element_size()
    has_memory = type(tensor) is Tensor and tensor.device.type == "cpu"  # a fake one has none
    if sys.platform == "linux" and has_memory and num_bytes >= _LEAST_BYTES:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (tensor.data_ptr() + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice only: where the system has no huge pages the call fails, and nothing is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _ADVICE_HUGE_PAGE)
    return tensor


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Make an uninitialized tensor on the CPU, with huge pages where it is large."""
    return prefer_huge_pages(torch.empty(shape, dtype=dtype, device="cpu"))
