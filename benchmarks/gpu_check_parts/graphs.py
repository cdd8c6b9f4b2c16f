"""The operators inside of a CUDA graph, which shows if anything waits for the device; replays give equal numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu_check_parts.correctness import draw_problem
from gpu_check_parts.session import Session, Unit
from tinyexperts.ops import expert_mlp, product_key_topk
from tinyexperts.ops.expert_mlp.table_gradient_gpu import GpuTableGradient
from tinyexperts.ops.row_adam.fused import row_adam_fused_

_SIZE = (257, 1000, 256, 32)


def units(session: Session) -> list[Unit]:
    """Return the captures; there are none where nothing runs."""
    if session.mode != "gpu":
        return []
    captured = {"experts and their gradients": _experts, "retrieval": _retrieval, "fused Adam": _adam}
    return [Unit(f"graph: {name}", partial(_capture, f"graph: {name}", make)) for name, make in captured.items()]


def _capture(name: str, make: Callable[[Session], Callable[[], tuple[Tensor, ...]]], session: Session) -> str:
    call = make(session)
    expected = [each.clone() for each in call()]  # and the kernels are checked
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for each in found:
        each.zero_()
    graph.replay()
    torch.cuda.synchronize()
    equal = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if not equal:
        session.wrong.append(name)
    return "captured, replays with the same numbers" if equal else "WRONG: captured, and replays with other numbers"


def _experts(session: Session) -> Callable[[], tuple[Tensor, ...]]:
    x, table, ids, weights, grad_y = draw_problem(session, _SIZE, 2, torch.float32)
    leaves = [each.requires_grad_() for each in (x, table, weights)]

    def call() -> tuple[Tensor, ...]:
        y = expert_mlp(leaves[0], leaves[1], ids, leaves[2], "gelu")
        return y.detach(), *torch.autograd.grad(y, leaves, grad_y)

    return call


def _retrieval(session: Session) -> Callable[[], tuple[Tensor, ...]]:
    draw = session.generator()
    query, keys = (
        torch.randn(shape, generator=draw, device=session.device, requires_grad=True)
        for shape in ((257, 8, 128), (2, 1024, 64))
    )

    def call() -> tuple[Tensor, ...]:
        scores, ids = product_key_topk(query, keys, 16)
        return scores.detach(), ids, *torch.autograd.grad(scores, (query, keys), torch.ones_like(scores))

    return call


def _adam(session: Session) -> Callable[[], tuple[Tensor, ...]]:
    x, table, ids, _, grad_y = draw_problem(session, _SIZE, 2, torch.float32)
    factors = torch.ones(2, *ids.shape, device=session.device)
    constants = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 1}

    def call() -> tuple[Tensor, ...]:
        tables = table.clone(), torch.zeros_like(table), torch.zeros_like(table)
        row_adam_fused_(*tables, GpuTableGradient(ids, factors, x, grad_y, table), **constants)
        return tables

    return call
