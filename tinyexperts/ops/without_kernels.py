"""A way to leave the CPU's kernels out, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tinyexperts.ops.cpu.compile import JIT_IS_DISABLED
from tinyexperts.ops.expert_mlp import columns
from tinyexperts.ops.expert_mlp import operator as expert_mlp
from tinyexperts.ops.product_key_topk import operator as product_key_topk
from tinyexperts.ops.row_adam import operator as row_adam

_OPERATORS = (
    expert_mlp._expert_mlp,
    expert_mlp._expert_mlp_backward,
    expert_mlp._gradient_rows,
    columns._products,
    columns._weighted_sum,
    product_key_topk._product_key_topk,
    product_key_topk._product_key_topk_backward,
    row_adam._row_adam_,
)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Run the operators in plain torch on the CPU too, as on a device without kernels."""
    with ExitStack() as stack:
        for operator in () if JIT_IS_DISABLED else _OPERATORS:
            stack.enter_context(operator.set_kernel_enabled("cpu", enabled=False))
        yield
