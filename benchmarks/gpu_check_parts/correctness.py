"""Outputs and every gradient against plain torch in fp64, in poisoned memory, twice for equal bits."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gpu_check_parts.session import TOLERANCES, Session, Unit, poisoned_memory, relative_error, same_bits
from tinyexperts.ops import expert_mlp, product_key_topk, quantize_groups, quantize_vectors, row_adam_
from tinyexperts.ops.expert_mlp import portable as portable_experts
from tinyexperts.ops.expert_mlp import reference as reference_experts
from tinyexperts.ops.expert_mlp.table_gradient_gpu import GpuTableGradient
from tinyexperts.ops.product_key_topk import portable as portable_topk
from tinyexperts.ops.row_adam import portable as portable_adam
from tinyexperts.ops.row_adam.fused import row_adam_fused_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("gelu", "relu", "relu2", "silu")
# M, N, D, P
_SMALL = ((1, 1, 1, 1), (5, 23, 7, 6), (3, 50, 33, 31))
_REAL = ((63, 500, 100, 31), (257, 1000, 256, 128), (64, 4096, 1024, 128), (33, 512, 768, 24), (16, 300, 2048, 128))
_EXACT = 0.0


def units(session: Session) -> list[Unit]:
    """Return the comparisons."""
    sizes = _SMALL if session.mode == "tiny" else _SMALL + _REAL
    found = []
    for size, vectors, dtype in product(sizes, (1, 2, 3), DTYPES):
        activations: tuple[str | None, ...] = (None,) if vectors == 1 else ACTIVATIONS[: 4 if size[0] < 10 else 1]
        if session.mode == "tiny" and dtype != torch.float32:
            activations = activations[:1]
        for activation in activations:
            name = f"experts {size}, E = {vectors}, {activation}, {_name(dtype)}"
            found.append(Unit(name, partial(_experts, name, size, vectors, activation, dtype)))
    for size, bits in product(sizes[1:], (8, 4)):
        name = f"experts {size} in {bits} bits"
        found.append(Unit(name, partial(_quantized_experts, name, size, bits)))
    sub_keys = ((9, 4), (20, 8), (100, 16), (1000, 8), (1024, 16), (1024, 32), (2048, 16), (4096, 16))
    for (num_sub_keys, k), shared in product(sub_keys[:2] if session.mode == "tiny" else sub_keys, (True, False)):
        name = f"retrieval S = {num_sub_keys}, k = {k}, {'shared' if shared else 'separate'} sub-keys"
        found.append(Unit(name, partial(_retrieval, name, num_sub_keys, k, shared)))
    for dtype, one_a_vector, fused in product(DTYPES[:2], (False, True), (False, True)):
        moment = "a vector" if one_a_vector else "an element"
        name = f"{'fused ' if fused else ''}Adam, a second moment {moment}, {_name(dtype)}"
        found.append(Unit(name, partial(_adam, name, dtype, one_a_vector, fused)))
    if session.mode == "gpu":
        found.append(Unit("offsets above 2^31 elements", _large_offsets))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw_problem(
    session: Session, size: tuple[int, int, int, int], num_vectors: int, dtype: torch.dtype, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x [M, D], a table [N, E, D], ids and weights [M, P] and the output's gradient [M, D]."""
    num_tokens, num_experts, dim, num_retrieved = size
    draw, device = session.generator(seed), session.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device)

    # Some experts of many tokens, and many of none.
    ids = (torch.rand(num_tokens, num_retrieved, generator=draw, device=device) ** 3 * num_experts).long()
    table = normal(num_experts, num_vectors, dim) / dim**0.5
    weights = torch.rand(num_tokens, num_retrieved, generator=draw, device=device)
    x, grad_y = normal(num_tokens, dim), normal(num_tokens, dim)
    return x.to(dtype), table.to(dtype), ids, weights.to(dtype), grad_y.to(dtype)


def _outputs_and_gradients(
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], activation: str | None, *, sparse: bool
) -> tuple[Tensor, ...]:
    x, table, ids, weights, grad_y = operands
    leaves = [each.clone().requires_grad_() for each in (x, table, weights)]
    y = expert_mlp(leaves[0], leaves[1], ids, leaves[2], activation, sparse=sparse)
    y.backward(grad_y)
    grad_x, grad_table, grad_weights = (leaf.grad for leaf in leaves)
    assert grad_x is not None
    assert grad_table is not None
    assert grad_weights is not None
    return y.detach(), grad_x, grad_weights, grad_table.to_dense() if sparse else grad_table


def _experts(
    name: str,
    size: tuple[int, int, int, int],
    num_vectors: int,
    activation: str | None,
    dtype: torch.dtype,
    session: Session,
) -> None:
    operands = draw_problem(session, size, num_vectors, dtype)
    with poisoned_memory():
        found = _outputs_and_gradients(operands, activation, sparse=False)
        again = _outputs_and_gradients(operands, activation, sparse=False)
        sparse = _outputs_and_gradients(operands, activation, sparse=True) if session.runs_kernels else found
    if not session.runs_kernels:
        _compile_rows(operands, num_vectors)
        return
    x, table, ids, weights, grad_y = operands
    x64, table64, weights64 = (each.double().requires_grad_() for each in (x, table, weights))
    y = reference_experts.expert_mlp(x64, table64, ids, weights64, activation)[0]
    y.backward(grad_y.double())
    grad_x = torch.zeros_like(x64) if x64.grad is None else x64.grad
    truths = dict(zip(("y", "dx", "dweights", "dtable"), (y, grad_x, weights64.grad, table64.grad), strict=True))
    errors = {key: relative_error(each, truths[key]) for key, each in zip(truths, found, strict=True)}
    errors |= {"same bits": same_bits(found, again), "sparse gradient": relative_error(sparse[3], truths["dtable"])}
    tolerances = dict.fromkeys((*truths, "sparse gradient"), TOLERANCES[dtype]) | {"same bits": _EXACT}
    session.compare(name, errors, tolerances)


def _compile_rows(operands: tuple[Tensor, ...], num_vectors: int) -> None:
    """Compile the gradient by rows: its numbers are made of no kernel's outputs, so that it can run dry."""
    x, table, ids, _, grad_y = operands
    factors = torch.zeros(num_vectors, *ids.shape)
    torch.ops.tinyexperts.expert_mlp_gradient_rows(ids, factors, x, grad_y, table)


def _quantized_experts(name: str, size: tuple[int, int, int, int], bits: int, session: Session) -> None:
    x, table, ids, weights, grad_y = draw_problem(session, size, 2, torch.float32)
    codes, scales = quantize_vectors(table) if bits == 8 else quantize_groups(table)

    def run() -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        y = expert_mlp(leaf, codes, ids, weights, "gelu", scales=scales)
        y.backward(grad_y)
        assert leaf.grad is not None
        return y.detach(), leaf.grad

    with poisoned_memory():
        found, again = run(), run()
    if not session.runs_kernels:
        return
    wide = (x.double(), codes, ids, weights.double())
    y, pre = portable_experts.expert_mlp(*wide, "gelu", scales.double(), False)
    grad_x = portable_experts.expert_mlp_backward(grad_y.double(), *wide, pre, "gelu", scales.double())[0]
    errors = {"y": relative_error(found[0], y), "dx": relative_error(found[1], grad_x)}
    session.compare(name, errors | {"same bits": same_bits(found, again)}, {"y": 1e-5, "dx": 1e-5, "same bits": _EXACT})


def _retrieval(name: str, num_sub_keys: int, k: int, shared: bool, session: Session) -> None:
    """Whole numbers, whose scores are exact and often equal; then normal ones, whose scores are compared."""
    num_tokens, num_heads, query_dim = (2, 2, 8) if session.mode == "tiny" else (65, 3, 64)
    draw, device = session.generator(num_sub_keys), session.device
    shapes = (
        (num_tokens, num_heads, query_dim),
        (*(() if shared else (num_heads,)), 2, num_sub_keys, query_dim // 2),
    )
    whole = [torch.randint(-2, 3, shape, generator=draw, device=device).float() for shape in shapes]
    normal = [torch.randn(shape, generator=draw, device=device) for shape in shapes]
    errors: dict[str, float] = {}
    for kind, (query, keys) in {"whole numbers": whole, "normal": normal}.items():
        leaves = query.clone().requires_grad_(), keys.clone().requires_grad_()
        with poisoned_memory():
            scores, ids = product_key_topk(*leaves, k)
            again = product_key_topk(query, keys, k)
            grad_scores = torch.randn(scores.shape, generator=draw, device=device)
            if not session.runs_kernels:  # the ids hold nothing, so that others stand in for them
                ids = torch.zeros_like(ids)
                torch.ops.tinyexperts.product_key_topk_backward(grad_scores, ids, query, keys)
                continue
            scores.backward(grad_scores)
        true_scores, true_ids = portable_topk.product_key_topk(query.double(), keys.double(), k)
        wide = query.double(), keys.double()
        gradients = portable_topk.product_key_topk_backward(grad_scores.double(), ids, *wide)
        if kind == "whole numbers":
            errors["ids of whole numbers"] = same_bits((ids, scores.double()), (true_ids, true_scores))
        errors |= {
            f"scores, {kind}": relative_error(scores, true_scores),
            f"same bits, {kind}": same_bits((scores, ids), again),
            f"gradients, {kind}": max(
                relative_error(leaf.grad, truth)
                for leaf, truth in zip(leaves, gradients, strict=True)  # type: ignore[arg-type]
            ),
        }
    exact = ("ids", "same bits")
    session.compare(name, errors, {key: _EXACT if key.startswith(exact) else 1e-5 for key in errors})


def _adam(name: str, dtype: torch.dtype, one_a_vector: bool, fused: bool, session: Session) -> None:
    size = (6, 20, 33, 5) if session.mode == "tiny" else (500, 3000, 256, 64)
    x, table, ids, _, grad_y = draw_problem(session, size, 2, torch.float32)
    draw = session.generator(1)
    factors = torch.randn(2, *ids.shape, generator=draw, device=session.device)
    second_shape = table.shape[:2] if one_a_vector else table.shape
    tables = [
        table.to(dtype),
        torch.randn(table.shape, generator=draw, device=session.device),
        torch.rand(second_shape, generator=draw, device=session.device),
    ]
    constants: dict[str, Any] = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    rows, gradients = portable_experts.gradient_rows(ids, factors.double(), x.double(), grad_y.double(), table.double())
    wide = [each.double() for each in tables]
    portable_adam.row_adam_(*wide, rows, gradients, *constants.values(), 3)
    runs = []
    # Of a bf16 table once more, rounded stochastically.
    for seed in (None, None, *((5,) if dtype == torch.bfloat16 else ())):
        changed = [each.clone() for each in tables]
        with poisoned_memory():
            if fused:
                gradient = GpuTableGradient(ids, factors.clone(), x, grad_y, table)
                row_adam_fused_(*changed, gradient, **constants, step=3, rounding_seed=seed)
            else:
                row_adam_(*changed, rows, gradients.float(), **constants, step=3, rounding_seed=seed)
        runs.append(tuple(changed))
    if not session.runs_kernels:
        return
    kinds = ("table", "exp_avg", "exp_avg_sq")
    errors = {kind: relative_error(each, truth) for kind, each, truth in zip(kinds, runs[0], wide, strict=True)}
    tolerances = dict.fromkeys(kinds, 1e-5) | {"table": TOLERANCES[dtype], "same bits": _EXACT}
    errors["same bits"] = same_bits(*runs[:2])
    for rounded in runs[2:]:
        errors["rounded stochastically"] = relative_error(rounded[0], wide[0])
        tolerances["rounded stochastically"] = TOLERANCES[dtype]
    session.compare(name, errors, tolerances)


def _large_offsets(session: Session) -> None:
    """Read and write the last rows of a table of 2^31 elements."""
    num_experts, dim = 2**20, 1024
    table = torch.zeros(num_experts, 2, dim, device=session.device, dtype=torch.bfloat16)
    table[-128:] = torch.randn(128, 2, dim, device=session.device, generator=session.generator()) / 32
    x, weights = torch.randn(4, dim, device=session.device), torch.ones(4, 128, device=session.device)
    ids = torch.arange(num_experts - 128, num_experts, device=session.device).repeat(4, 1)
    leaf = table.requires_grad_()
    y = expert_mlp(x, leaf, ids, weights, "gelu")
    y.backward(x)
    small = table.detach()[-128:].double().requires_grad_()
    truth = reference_experts.expert_mlp(x.double(), small, ids - (num_experts - 128), weights.double(), "gelu")[0]
    truth.backward(x.double())
    assert leaf.grad is not None
    assert small.grad is not None
    errors = {
        "y": relative_error(y, truth),
        "dtable": relative_error(leaf.grad[-128:], small.grad),
        "rest": float(leaf.grad[:-128].count_nonzero()),
    }
    session.compare("offsets above 2^31 elements", errors, {"y": 1e-5, "dtable": 6e-3, "rest": _EXACT})
