"""LowRankAdam against torch's Adam on the two factors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tinyexperts.errors import InputError
from tinyexperts.optim import LowRankAdam


@pytest.mark.parametrize("shape", [(5, 7), (3, 7, 5), (1, 9), (6, 2)])
def test_steps_are_those_of_adam_on_the_factors(shape) -> None:
    torch.manual_seed(0)
    origin = torch.randn(shape, dtype=torch.float64)
    matrix = torch.nn.Parameter(origin.clone())
    optimizer = LowRankAdam([matrix], rank=2, lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    *several, out, width = shape
    targets = [torch.randn(shape, dtype=torch.float64) for _ in range(6)]
    matrix.grad = torch.zeros_like(matrix)
    optimizer.step()  # draws A, and changes nothing
    assert torch.equal(matrix, origin)
    down = optimizer.state[matrix]["down"].clone().requires_grad_()
    assert down.shape == (*several, 2, width)
    assert down.abs().max() <= width**-0.5
    up = torch.zeros(*several, out, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([down, up], lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    down.grad, up.grad = torch.zeros_like(down), torch.zeros_like(up)
    reference.step()
    for target in targets:
        optimizer.zero_grad()
        (matrix - target).square().sum().backward()
        optimizer.step()
        reference.zero_grad()
        (origin + up @ down - target).square().sum().backward()
        reference.step()
        assert_close(matrix.detach(), (origin + up @ down).detach(), rtol=1e-9, atol=1e-12)
    assert not torch.equal(matrix, origin)


def test_the_seed_draws_a_and_parameters_differ() -> None:
    def drawn(seed):
        parameters = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(2)]
        optimizer = LowRankAdam(parameters, rank=3, seed=seed)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return [optimizer.state[parameter]["down"] for parameter in parameters]

    first, second = drawn(1)
    assert not torch.equal(first, second)
    assert torch.equal(drawn(1)[0], first)
    assert not torch.equal(drawn(2)[0], first)
    assert not torch.equal(drawn(2)[0], second), "the first of the next seed is no second of this one"


@pytest.mark.parametrize(
    ("make", "refusal"),
    [
        (lambda: LowRankAdam([torch.nn.Parameter(torch.zeros(3, 3))], rank=0), "rank must be at least 1, got 0"),
        (lambda: LowRankAdam([torch.nn.Parameter(torch.zeros(3))], rank=1), r"two dimensions or more, got .* \[3\]"),
    ],
)
def test_what_it_refuses(make, refusal) -> None:
    with pytest.raises(InputError, match=refusal):
        make()
