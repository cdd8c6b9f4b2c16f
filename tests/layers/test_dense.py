"""DenseFFN: the formula and the account of its costs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinyexperts import DenseFFN


def test_equals_the_formula():
    layer = DenseFFN(6, 10, activation="relu2")
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), F.relu(x @ layer.up.weight.T) ** 2 @ layer.down.weight.T)
    assert DenseFFN(6).up.weight.shape == (24, 6)


def test_a_mask_changes_nothing():
    layer, x = DenseFFN(6, 10), torch.randn(2, 3, 6)
    assert torch.equal(layer(x, torch.tensor([[True, False, True]] * 2)), layer(x))
    with pytest.raises(ValueError, match=r"bool \[2, 3\] on cpu, got bool \[3\]"):
        layer(x, torch.ones(3, dtype=torch.bool))


def test_flops_and_parameters_are_counted():
    layer = DenseFFN(6, 10)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(7, 6))
    assert counter.get_total_flops() == 7 * layer.flops_per_token().total
    assert layer.num_parameters().total == layer.num_parameters().active == sum(p.numel() for p in layer.parameters())
    assert layer.parameter_groups().tables == []


def test_bad_options_raise():
    with pytest.raises(ValueError, match="got 0 and 10"):
        DenseFFN(0, 10)
    with pytest.raises(ValueError, match="got 'tanh'"):
        DenseFFN(6, 10, activation="tanh")
