"""clip_gradient_norm_: equal to torch's on densified gradients, and nothing of the size of a table is touched."""

from __future__ import annotations

import pytest
import torch

from tinyexperts.errors import InputError
from tinyexperts.optim import clip_gradient_norm_, rows_and_values


def parameters(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense, table, idle = (torch.nn.Parameter(torch.zeros(s)) for s in ((3, 4), (9, 2, 2), (5,)))
    dense.grad = torch.randn(3, 4, generator=generator)
    values = torch.randn(len(rows), 2, 2, generator=generator)
    table.grad = torch.sparse_coo_tensor([rows], values, (9, 2, 2), check_invariants=True)
    return [dense, table, idle]


@pytest.mark.parametrize("rows", [[1, 4, 8], [8, 1, 4], [4, 1, 4, 4], [1, 4, 4], []])
@pytest.mark.parametrize("max_norm", [0.1, 1e6, None, float("inf")])
def test_equals_torch_on_densified_gradients(rows, max_norm):
    ours, theirs = parameters(rows), parameters(rows)
    theirs[1].grad = theirs[1].grad.to_dense()
    expected = torch.nn.utils.clip_grad_norm_(theirs, float("inf") if max_norm is None else max_norm)
    torch.testing.assert_close(clip_gradient_norm_(ours, max_norm), expected)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    assert ours[1].grad.is_sparse
    torch.testing.assert_close(ours[1].grad.to_dense(), theirs[1].grad)


def test_a_table_of_any_size_costs_its_touched_rows():
    table = torch.nn.Parameter(torch.empty(2**40, 4, device="meta"))
    values = torch.ones(2, 4)
    table = torch.nn.Parameter(torch.zeros(1).expand(2**40, 4))  # no memory behind it: a dense pass would not fit
    table.grad = torch.sparse_coo_tensor([[5, 2**39]], values, (2**40, 4), check_invariants=True)
    assert clip_gradient_norm_([table], 1.0) == pytest.approx(8**0.5)
    torch.testing.assert_close(table.grad._values().norm(), torch.tensor(1.0))


def test_no_gradients_at_all():
    assert clip_gradient_norm_([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0


def test_a_norm_that_is_not_finite_is_returned():
    ours = parameters([1])
    ours[0].grad[0, 0] = float("nan")
    assert clip_gradient_norm_(ours, 1.0).isnan()


def test_bad_max_norm_raises():
    with pytest.raises(InputError, match=r"max_norm must be positive.*got 0"):
        clip_gradient_norm_(parameters([1]), 0)


def test_rows_and_values_sum_repeated_rows_and_share_memory_otherwise():
    values = torch.tensor([[1.0], [2.0], [4.0]])
    once = torch.sparse_coo_tensor([[0, 3, 5]], values, (6, 1), check_invariants=True)
    rows, got = rows_and_values(once)
    assert rows.tolist() == [0, 3, 5]
    assert got.data_ptr() == once._values().data_ptr()
    repeated = torch.sparse_coo_tensor([[3, 0, 3]], values, (6, 1), check_invariants=True)
    rows, got = rows_and_values(repeated)
    assert rows.tolist() == [0, 3]
    assert got.tolist() == [[2.0], [5.0]]
    with pytest.raises(InputError, match="one sparse dimension, got 2"):
        rows_and_values(torch.eye(3).to_sparse())


def test_a_single_parameter_is_clipped():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradient_norm_(parameter, 1.0) == 5
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
