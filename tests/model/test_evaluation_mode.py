"""evaluation_mode: each module keeps the mode that it had, whatever was raised meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinyexperts.model import evaluation_mode


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def partly_frozen(*, training):
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()), nn.Linear(3, 3), nn.Dropout()).train(training)
    model[0].train(not training)
    model[0][1].train(training)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("raised", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_each_module_gets_its_own_mode_back(training, raised):
    model = partly_frozen(training=training)
    before = modes(model)
    assert before == {"": training, "0": not training, "0.0": not training, "0.1": training, "1": training,
                      "2": training}  # fmt: skip
    if raised is None:
        with evaluation_mode(model):
            assert not any(modes(model).values())
    else:
        with pytest.raises(raised), evaluation_mode(model):
            raise raised
    assert modes(model) == before


class Merged(nn.Module):
    """Keeps its matrix merged while it is evaluated, as some adapters do."""

    def __init__(self):
        super().__init__()
        self.merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_what_a_module_does_when_its_mode_is_set_is_done_again():
    model = nn.Sequential(Merged(), nn.Sequential(Merged()))
    model[1].eval()
    with evaluation_mode(model):
        assert [model[0].merged, model[1][0].merged] == [True, True]
    assert [model[0].merged, model[1][0].merged] == [False, True]


class StaysFrozen(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


def test_a_module_that_refuses_to_train_is_left_as_it_was():
    model = nn.Sequential(StaysFrozen(2), nn.Dropout())
    for own in (False, True):
        model[0].training = own
        with evaluation_mode(model):
            assert torch.equal(model(torch.ones(3, 2)), torch.ones(3, 2) / (1 + 1e-5) ** 0.5)
        assert modes(model) == {"": True, "0": own, "1": True}
