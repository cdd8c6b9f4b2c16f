"""What is timed: the same table, the same steps, and the bytes that a forward pass keeps."""

from __future__ import annotations

import pytest
import torch

from tinyexperts.bench import contestants
from tinyexperts.bench.contestants import make_layer, our_layer, settle
from tinyexperts.ops.expert_mlp import operator as expert_operator

D, N, M = 16, 64, 8


def test_the_reference_shares_the_table_and_takes_the_same_step():
    layer = make_layer(D, N)
    x, grad_y = torch.randn(M, D), torch.randn(M, D)
    ours = our_layer(layer, "row")
    settle(ours, x, grad_y)
    router = {name: value.clone() for name, value in layer.router.state_dict().items()}
    before = layer.experts.detach().clone()
    twin = contestants.reference(ours)
    twin.step(x, grad_y)
    assert not expert_operator._expert_mlp._disabled_kernel, "the kernels run again"
    by_reference = layer.experts.detach().clone()
    assert not torch.equal(by_reference, before)
    torch.testing.assert_close(layer.router.state_dict(), router)  # the router is its own
    with torch.no_grad():
        layer.experts.copy_(before)
    for moments in ours.optimizers[0].state.values():
        for moment in moments.values():
            moment.zero_() if moment.dim() else moment.fill_(1)
    ours.step(x, grad_y)
    torch.testing.assert_close(layer.experts.detach(), by_reference)


# Torch's compiler looks at it itself, after a break of the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_the_compiled_reference_is_the_layer_and_shares_its_table():
    layer = make_layer(D, N)
    x, grad_y = torch.randn(M, D), torch.randn(M, D)
    baseline = contestants.compiled_reference(layer)
    (table,) = [p for p in baseline.module.parameters() if p.dim() == 3 and p.shape[0] == N]
    assert table.data_ptr() == layer.experts.data_ptr()
    torch.testing.assert_close(baseline.forward(x), layer(x))
    before = layer.experts.detach().clone()
    y = layer(x)
    y.backward(grad_y)
    touched = layer.experts.grad.coalesce().indices()[0]
    baseline.step(x, grad_y)
    moved = (layer.experts.detach() != before).flatten(1).any(1).nonzero()[:, 0]
    assert torch.equal(moved, touched)


def test_kept_bytes_are_those_of_a_dense_layer():
    x = torch.randn(M, D)
    # The tokens, and the hidden neurons before and after their activation.
    assert contestants.dense(D, 32).activation_bytes(x[:M]) == M * (D + 32 + 32) * 4
