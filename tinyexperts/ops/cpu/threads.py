"""A pool of threads that runs a kernel in parts, on as many threads as torch uses.

numba's own threads can't be used: its OpenMP layer is killed in a process that was forked after use (DataLoader
workers), its work queue aborts when two Python threads call it at once. Kernels release the GIL, so plain threads do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import torch

# More parts than threads, so that a thread whose core is busy elsewhere holds up less.
_PARTS_PER_THREAD = 4

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = Lock()


def parallel_for(kernel: Callable[..., Any], num_items: int, *arguments: Any, min_items: int = 1) -> None:
    """Call kernel(*arguments, start, stop) until the parts start..stop have covered 0..num_items.

    A kernel whose result for an item does not depend on the part gives the same bits for any number of threads.

    Args:
        kernel (callable): takes the arguments, then start and stop.
        num_items (int): items in all.
        arguments: those that the kernel takes before start and stop.
        min_items (int): items that are worth a part of their own; the caller runs fewer than two such parts alone.
    """
    num_threads = torch.get_num_threads()
    num_parts = min(num_threads * _PARTS_PER_THREAD, num_items // min_items)
    if num_threads == 1 or num_parts < 2:
        kernel(*arguments, 0, num_items)
        return
    numbers = itertools.count()

    def work() -> None:
        while (part := next(numbers)) < num_parts:
            kernel(*arguments, part * num_items // num_parts, (part + 1) * num_items // num_parts)

    # The caller works too, so that a pool that is busy or short of threads slows it down and never holds it up.
    helpers = [_threads(num_threads - 1).submit(work) for _ in range(min(num_threads, num_parts) - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="tinyexperts"), count
        return _pool


def _forget_threads() -> None:
    """Start without threads in a forked child, which has none of its parent's threads and perhaps its lock."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
