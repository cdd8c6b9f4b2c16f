"""What several files of tests share: random operands of expert_mlp, small layers, and what comes out of both."""

from __future__ import annotations

import torch

from tinyexperts import PEER
from tinyexperts.ops import expert_mlp

# Large enough that every kernel is worth several parts.
SEVERAL_PARTS = {"num_tokens": 131, "num_experts": 4096, "model_dim": 64, "retrieved": 32}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def float_patterns():
    """Numbers (fp32) with each upper half, bf16's bits, once, and lower halves of all kinds; also the special ones."""
    draw = torch.Generator().manual_seed(0)
    lower_halves = torch.cat(
        [torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]), torch.randint(2**16, (12,), generator=draw)]
    )
    upper = torch.arange(-(2**15), 2**15)
    lower = lower_halves[torch.randint(len(lower_halves), upper.shape, generator=draw)]
    bits = (upper * 2**16 + lower).to(torch.int32)
    largest = torch.finfo(torch.float32).max
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), largest, -largest, 1e-45, 3.3895314e38]
    )
    in_the_lower_half = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F7F0001], dtype=torch.int32)  # two NaN, one finite
    return torch.cat([bits.view(torch.float32), special, in_the_lower_half.view(torch.float32)])


def problem(num_vectors=2, *, num_tokens=5, num_experts=23, model_dim=7, retrieved=6, dtype=torch.float32, seed=0):
    """Tokens, a table whose products with them have the variance 1, ids, and router weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, model_dim, generator=generator, dtype=torch.float64)
    experts = torch.randn(num_experts, num_vectors, model_dim, generator=generator, dtype=torch.float64)
    ids = torch.randint(num_experts, (num_tokens, retrieved), generator=generator)
    weights = torch.rand(num_tokens, retrieved, generator=generator, dtype=torch.float64)
    return x.to(dtype), (experts / model_dim**0.5).to(dtype), ids, weights.to(dtype)


def operator_results(inputs, activation, *, sparse=False):
    """The output, and the gradients of x, table and weights."""
    x, experts, weights = (inputs[i].clone().requires_grad_() for i in (0, 1, 3))
    y = expert_mlp(x, experts, inputs[2], weights, activation, sparse=sparse)
    y.backward(randn(*y.shape, seed=6, dtype=y.dtype))
    return [y.detach(), torch.zeros_like(x) if x.grad is None else x.grad, experts.grad, weights.grad]


def make_layer(seed=0, **options):
    """A PEER layer with the sizes of SEVERAL_PARTS."""
    torch.manual_seed(seed)
    return PEER(64, 64**2, **({"num_heads": 4, "experts_per_head": 8, "query_dim": 16} | options))


def make_small_layer(kind, num_experts=256, **options):
    torch.manual_seed(0)
    return kind(32, num_experts, num_heads=2, query_dim=8, experts_per_head=6, **options)


def layer_results(layer, x):
    """The output and the gradients of x and of every parameter."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(randn(*y.shape, seed=5))
    return [y.detach(), leaf.grad, *(dense(parameter.grad) for parameter in layer.parameters())]


def dense(tensor):
    return tensor.to_dense() if tensor.is_sparse else tensor


def assert_equal(got, expected):
    """Assert that tensors have the same types and the same bits."""
    assert len(got) == len(expected)
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"number {number} differs by up to {(a - b).abs().max()}"
