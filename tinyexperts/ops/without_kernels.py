"""A switch that turns the CPU's kernels off, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch._library.custom_ops import OPDEFS

import tinyexperts.ops.expert_mlp.columns  # noqa: F401  # defines operators, and ops does not import it


@contextmanager
def without_kernels() -> Iterator[None]:
    """Run the operators in plain torch on the CPU too, as on a device without kernels."""
    with ExitStack() as stack:
        for name, operator in list(OPDEFS.items()):
            if name.startswith("tinyexperts::") and "cpu" in operator._backend_fns:
                stack.enter_context(operator.set_kernel_enabled("cpu", enabled=False))
        yield
