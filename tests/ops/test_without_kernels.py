"""The operators run in plain torch where the kernels are left out, compiled or not."""

from __future__ import annotations

import torch
from operands import problem
from torch._library.custom_ops import OPDEFS

from tinyexperts.ops.expert_mlp import portable
from tinyexperts.ops.without_kernels import without_kernels


def test_every_operator_with_a_kernel_is_left_out():
    ours = [operator for name, operator in OPDEFS.items() if name.startswith("tinyexperts::")]
    with_kernels = [operator for operator in ours if "cpu" in operator._backend_fns]
    assert len(with_kernels) >= 8
    with without_kernels():
        assert all("cpu" in operator._disabled_kernel for operator in with_kernels)
    assert not any(operator._disabled_kernel for operator in with_kernels)


def test_a_compiled_function_follows_the_switch(monkeypatch):
    calls, check = [], portable.check_indices
    monkeypatch.setattr(portable, "check_indices", lambda *operands: calls.append(operands) or check(*operands))
    compiled = torch.compile(
        lambda *operands: torch.ops.tinyexperts.expert_mlp(*operands, "gelu", None, False)[0],
        backend="aot_eager",
        fullgraph=True,
    )
    inputs = problem()
    expected = compiled(*inputs)
    assert not calls
    with without_kernels():
        torch.testing.assert_close(compiled(*inputs), expected)
    assert len(calls) == 1
    assert torch.equal(compiled(*inputs), expected)
    assert len(calls) == 1
