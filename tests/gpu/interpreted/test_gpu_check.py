"""The comparisons of benchmarks/gpu_check.py at small sizes: they pass, and see planted faults."""

from __future__ import annotations

import pytest
import torch
from gpu_check_parts import correctness
from gpu_check_parts.session import Session, relative_error
from gpu_code_on_cpu import gpu_code_on_cpu

from tinyexperts.ops.gpu import dispatch


@pytest.fixture
def session(tmp_path):
    return Session("tiny", tmp_path, seconds=60)


@pytest.fixture(autouse=True)
def code_of_gpus(monkeypatch):
    monkeypatch.setattr(dispatch, "SETTING", "triton")
    monkeypatch.setattr(dispatch, "_check", lambda *_: None)  # it compares the same once more, on other operands
    with gpu_code_on_cpu():
        yield


UNITS = (
    "experts (5, 23, 7, 6), E = 3, silu, float32",
    "experts (5, 23, 7, 6) in 8 bits",
    "retrieval S = 9, k = 4, separate sub-keys",
    "Adam, a second moment an element, bfloat16",
    "fused Adam, a second moment a vector, float32",
)


def some_units(session, kinds=("experts", "retrieval", "Adam", "fused Adam")):
    found = {unit.name: unit for unit in correctness.units(session)}
    return [found[name] for name in UNITS if name.startswith(kinds)]


def test_right_kernels_pass(session, launched_kernels):
    for unit in some_units(session):
        launched_kernels.clear()
        unit.measure(session)
        assert launched_kernels, unit.name
    assert session.wrong == []
    assert len(session.results["largest errors"]) > 10


@pytest.mark.parametrize("name", ["expert_mlp", "product_key_topk", "row_adam_"])
def test_wrong_numbers_are_seen(session, monkeypatch, name):
    right = getattr(correctness, name)

    def wrong(*operands, **options):
        found = right(*operands, **options)
        if name == "row_adam_":
            operands[0].mul_(1.1)
            return None
        return 1.1 * found if name == "expert_mlp" else (found[0], found[1].flip(-1))

    monkeypatch.setattr(correctness, name, wrong)
    kind = {"expert_mlp": "experts", "product_key_topk": "retrieval", "row_adam_": "Adam"}[name]
    units = some_units(session, (kind,))
    for unit in units:
        unit.measure(session)
    assert session.wrong == [unit.name for unit in units] != []


def test_other_bits_the_second_time_are_seen(session, monkeypatch):
    right, calls = correctness.expert_mlp, []

    def unsteady(*operands, **options):
        calls.append(operands)
        return right(*operands, **options) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(correctness, "expert_mlp", unsteady)
    unit = some_units(session)[0]
    unit.measure(session)
    assert session.wrong == [unit.name]
    assert set(session.results[f"WRONG: {unit.name}"]) == {"same bits"}


def test_numbers_that_are_not_finite_are_wrong():
    truth = torch.ones(3)
    assert relative_error(torch.tensor([1.0, torch.nan, 1.0]), truth) == torch.inf
    assert relative_error(truth[:2], truth) == torch.inf
    assert relative_error(truth, truth) == 0
