"""Triton's kernels compiled for GPUs that are not here, in an ordinary process of tests."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest


@pytest.fixture
def launches(request, monkeypatch):
    """A function that takes a target ("sm_90"): kernels are compiled for it and not run; gives the list of launches.

    Compiled kernels are kept between runs of the tests, in pytest's folder for such things. The test is skipped where
    Triton can't be imported, or interprets kernels.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("with TRITON_INTERPRET=1 kernels are not compiled")
    from dry_driver import dry_driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))
    with ExitStack() as stack:
        yield lambda target: stack.enter_context(dry_driver(target))
