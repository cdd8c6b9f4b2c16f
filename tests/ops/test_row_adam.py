"""row_adam_: equal to torch.optim.SparseAdam, touches nothing but the rows it is given, and is a well-made operator."""

from __future__ import annotations

import warnings

import pytest
import torch

from tinyexperts.errors import InputError
from tinyexperts.ops.row_adam import row_adam_

HYPERPARAMETERS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def random_rows(num_rows: int, num_touched: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(num_rows, generator=generator)[:num_touched].sort().values


def example(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Tables that already hold moments, so that a forgotten decay shows."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(11, 2, 3, generator=generator).to(dtype)
    exp_avg = torch.randn(11, 2, 3, generator=generator)
    exp_avg_sq = torch.rand(11, 2, 3, generator=generator)
    if dtype == torch.float64:
        exp_avg, exp_avg_sq = exp_avg.double(), exp_avg_sq.double()
    rows = random_rows(11, 4, generator)
    return experts, exp_avg, exp_avg_sq, rows, torch.randn(4, 2, 3, generator=generator).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_row_adam_equals_sparse_adam_over_100_steps(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(50, 2, 8, generator=generator, dtype=dtype)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SparseAdam([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 101):
        rows = random_rows(50, 7, generator)
        grad_rows = torch.randn(7, 2, 8, generator=generator, dtype=dtype)
        theirs.grad = torch.sparse_coo_tensor(rows[None], grad_rows, start.shape, check_invariants=False)
        with warnings.catch_warnings():
            # SparseAdam itself builds sparse tensors without saying whether torch shall check them.
            warnings.filterwarnings("ignore", message="Sparse invariant checks")
            optimizer.step()
        row_adam_(ours, exp_avg, exp_avg_sq, rows, grad_rows, step=step, **HYPERPARAMETERS)
    state = optimizer.state[theirs]
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=tolerance)
    torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=0, atol=tolerance)
    torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=0, atol=tolerance)


def test_row_adam_leaves_untouched_rows_bit_equal() -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example()
    before = [table.clone() for table in (experts, exp_avg, exp_avg_sq)]
    row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, step=5, **HYPERPARAMETERS)
    untouched = torch.ones(11, dtype=torch.bool)
    untouched[rows] = False
    for table, old in zip((experts, exp_avg, exp_avg_sq), before, strict=True):
        assert torch.equal(table[untouched], old[untouched])
        assert (table[rows] != old[rows]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_adam_on_low_precision_tables_computes_in_fp32_and_rounds_once(dtype: torch.dtype) -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example(dtype)
    wide = [tensor.float().clone() for tensor in (experts, exp_avg, exp_avg_sq)]
    row_adam_(*wide, rows, grad_rows.float(), step=2, **HYPERPARAMETERS)
    row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, step=2, **HYPERPARAMETERS)
    assert torch.equal(experts, wide[0].to(dtype))
    assert torch.equal(exp_avg, wide[1])
    assert torch.equal(exp_avg_sq, wide[2])


def test_row_adam_with_no_rows_changes_nothing() -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example()
    before = [table.clone() for table in (experts, exp_avg, exp_avg_sq)]
    row_adam_(experts, exp_avg, exp_avg_sq, rows[:0], grad_rows[:0], step=1, **HYPERPARAMETERS)
    for table, old in zip((experts, exp_avg, exp_avg_sq), before, strict=True):
        assert torch.equal(table, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_row_adam_passes_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.tinyexperts.row_adam_.default, (*example(dtype), 1e-2, 0.9, 0.99, 1e-8, 3))


def test_row_adam_compiled_equals_eager() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(
        experts: torch.Tensor, m: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, grad_rows: torch.Tensor
    ) -> torch.Tensor:
        row_adam_(experts, m, v, rows, 2 * grad_rows, step=4, **HYPERPARAMETERS)
        return experts + 1

    eager = example()
    compiled = [tensor.clone() for tensor in eager]
    row_adam_(*eager[:4], 2 * eager[4], step=4, **HYPERPARAMETERS)
    result = update(*compiled)
    assert torch.equal(result, eager[0] + 1)
    for ours, expected in zip(compiled[:3], eager[:3], strict=True):
        assert torch.equal(ours, expected)


def test_row_adam_takes_a_parameter_and_records_no_graph() -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example()
    parameter = torch.nn.Parameter(experts.clone())
    row_adam_(experts, exp_avg.clone(), exp_avg_sq.clone(), rows, grad_rows, step=1, **HYPERPARAMETERS)
    row_adam_(parameter, exp_avg, exp_avg_sq, rows, grad_rows, step=1, **HYPERPARAMETERS)
    assert torch.equal(parameter.detach(), experts)
    assert parameter.is_leaf


def test_row_adam_says_what_is_wrong_with_its_input() -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example()
    with pytest.raises(InputError, match=r"rows must be int64 of shape \[R\], got torch.int32"):
        row_adam_(experts, exp_avg, exp_avg_sq, rows.int(), grad_rows, step=1, **HYPERPARAMETERS)
    with pytest.raises(InputError, match=r"shape \[4, 2, 3\], got \[3, 2, 3\]"):
        row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows[:3], step=1, **HYPERPARAMETERS)
    with pytest.raises(InputError, match=r"the table's shape \[11, 2, 3\]"):
        row_adam_(experts, exp_avg[:4], exp_avg_sq, rows, grad_rows, step=1, **HYPERPARAMETERS)
    with pytest.raises(InputError, match="counted from 1, got 0"):
        row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, step=0, **HYPERPARAMETERS)
    with pytest.raises(IndexError):
        row_adam_(experts, exp_avg, exp_avg_sq, rows + 11, grad_rows, step=1, **HYPERPARAMETERS)
