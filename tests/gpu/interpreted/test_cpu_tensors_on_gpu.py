"""The way there and back, with the CPU in the place of the GPU: values, what is changed in place, and strides."""

from __future__ import annotations

import torch
from cpu_tensors_on_gpu import cpu_tensors_on_gpu
from operands import operator_results, problem, randn

from tinyexperts.ops import product_key_topk
from tinyexperts.ops.expert_mlp import gpu
from tinyexperts.ops.row_adam import row_adam_

STEP = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 2}


def test_outputs_and_gradients_come_back(triton_is_allowed, launched_kernels):
    inputs = problem(2)
    expected = operator_results(inputs, "gelu")
    assert not launched_kernels
    with cpu_tensors_on_gpu("cpu"):
        found = operator_results(inputs, "gelu")
    assert {"forward", "backward"} <= set(launched_kernels)
    torch.testing.assert_close(found, expected)
    launched_kernels.clear()
    torch.testing.assert_close(operator_results(inputs, "gelu"), expected)
    assert not launched_kernels


def test_several_outputs_come_back(triton_is_allowed, launched_kernels):
    query, keys = randn(1, 1, 8), randn(2, 16, 4, seed=1)
    expected = product_key_topk(query, keys, 4)
    with cpu_tensors_on_gpu("cpu"):
        found = product_key_topk(query, keys, 4)
    assert launched_kernels
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


def test_what_is_changed_in_place_comes_back(triton_is_allowed, launched_kernels):
    rows, gradients = torch.tensor([4, 1]), randn(2, 2, 5, seed=1)
    tables = [[randn(7, 2, 5), randn(7, 2, 5, seed=2), randn(7, 2, 5, seed=3).square()] for _ in range(2)]
    row_adam_(*tables[0], rows, gradients, **STEP)
    with cpu_tensors_on_gpu("cpu"):
        row_adam_(*tables[1], rows, gradients.expand(2, 2, 5), **STEP)
    assert "update_rows" in launched_kernels
    torch.testing.assert_close(tables[1], tables[0])
    assert not torch.equal(tables[1][0], randn(7, 2, 5))


def test_kernels_meet_the_strides_of_the_test(triton_is_allowed, monkeypatch):
    met = []
    kernel = gpu.EXPERT_MLP
    monkeypatch.setattr(
        gpu,
        "EXPERT_MLP",
        type(kernel)(lambda *a: met.append(a[0].stride()) or kernel.plan(*a), kernel.run, kernel.example),
    )
    x, experts, ids, weights = problem(2)
    with cpu_tensors_on_gpu("cpu"):
        operator_results((x.t().contiguous().t(), experts, ids, weights), "gelu")
    assert (1, len(x)) in met
