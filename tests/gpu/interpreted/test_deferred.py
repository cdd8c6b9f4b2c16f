"""A training step whose table gradient is deferred as on a CUDA device: clipped and applied straight from the pairs."""

from __future__ import annotations

import pytest
import torch
from gpu_code_on_cpu import gpu_code_on_cpu
from operands import problem, randn

from tinyexperts.ops import expert_mlp
from tinyexperts.ops.expert_mlp import deferred, operator
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.ops.expert_mlp.table_gradient_gpu import GpuTableGradient
from tinyexperts.ops.gpu.dispatch import relative_error
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients, row_sparse_adam

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take the twin for CUDA devices for tables on the CPU, of any type."""
    for module in (deferred, row_sparse_adam):
        monkeypatch.setattr(module, "supports_deferred", lambda table: True)

    def use_for(table):
        monkeypatch.setattr(operator, "TableGradient", lambda *operands: GpuTableGradient(*operands, table))

    with gpu_code_on_cpu():
        yield use_for


def steps(use_for, *, fused, second_moment, table_dtype, max_norm, passes=1):
    """The table, its moments and the norms after two steps."""
    _, table, ids, weights = problem(2)
    table = torch.nn.Parameter(table.to(table_dtype))
    use_for(table)
    optimizer = RowSparseAdam([table], lr=1e-2, weight_decay=0.1, second_moment=second_moment, fused=fused)
    norms = []
    for step in range(2):
        optimizer.zero_grad()
        with deferred_gradients([optimizer]):
            for each in range(passes):
                x = randn(5, 7, seed=10 * step + each)
                expert_mlp(x, table, ids, weights, "gelu", sparse=True).square().sum().backward()
        is_pending = isinstance(pending_gradient(table.grad), GpuTableGradient)
        assert is_pending == (fused and passes == 1)
        norms.append(clip_gradient_norm_([table], max_norm))
        assert isinstance(pending_gradient(table.grad), GpuTableGradient) == is_pending, "clipping keeps it"
        optimizer.step()
    state = optimizer.state[table]
    return table.detach(), state["exp_avg"], state["exp_avg_sq"], torch.stack(norms)


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("table_dtype", list(TOLERANCES))
def test_a_fused_step_equals_one_with_rows_written_out(
    as_on_a_gpu, launched_kernels, table_dtype, second_moment, max_norm
):
    options = {"second_moment": second_moment, "table_dtype": table_dtype, "max_norm": max_norm}
    expected = steps(as_on_a_gpu, fused=False, **options)
    assert "update_rows" in launched_kernels
    launched_kernels.clear()
    found = steps(as_on_a_gpu, fused=True, **options)
    assert "update_rows" not in launched_kernels
    assert launched_kernels[-2:] == ["sum_tiles", "add_parts"]
    # A row that is written out in bf16 is rounded once more.
    for each, other in zip(found, expected, strict=True):
        assert relative_error(each, other) <= TOLERANCES[table_dtype]


def test_two_passes_write_the_sum_out(as_on_a_gpu):
    options = {"second_moment": "element", "table_dtype": torch.float32, "max_norm": 0.1, "passes": 2}
    found, expected = (steps(as_on_a_gpu, fused=fused, **options) for fused in (True, False))
    for each, other in zip(found, expected, strict=True):
        assert relative_error(each, other) <= 1e-6


def test_it_shares_no_memory_with_what_may_change(as_on_a_gpu):
    ids, x, grad_y = torch.randint(9, (4, 3)), randn(4, 5), randn(4, 5, seed=1)
    table = torch.zeros(9, 2, 5)
    gradient = GpuTableGradient(ids, randn(2, 4, 3, seed=2), x, grad_y, table)
    rows, values = gradient.rows_and_values()
    norm = gradient.squared_norm()
    assert norm.item() == pytest.approx(values.double().square().sum().item(), rel=1e-6)
    x.zero_()
    grad_y.zero_()
    again = GpuTableGradient.rows_and_values(gradient)
    assert torch.equal(again[0], rows)
    assert torch.equal(again[1], values)
    gradient.scale_(torch.tensor(0.5))
    assert torch.equal(gradient.rows_and_values()[1], values / 2)


def test_values_alone_need_no_tokens(as_on_a_gpu):
    ids, x, grad_y = torch.randint(9, (4, 3)), torch.full((4, 5), torch.nan), randn(4, 5, seed=1)
    gradient = GpuTableGradient(ids, randn(1, 4, 3, seed=2), x, grad_y, torch.zeros(9, 1, 5))
    assert gradient.rows_and_values()[1].isfinite().all()
    assert gradient.squared_norm().isfinite()
