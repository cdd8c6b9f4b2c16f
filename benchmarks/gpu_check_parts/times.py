"""Times of the operators and of the layer, as shares of the copy's bandwidth and as ratios to other layers."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_check_parts.correctness import draw_problem
from gpu_check_parts.device_facts import COPY
from gpu_check_parts.session import Session, Unit
from tinyexperts.bench import contestants
from tinyexperts.bench.contestants import Contestant
from tinyexperts.layers import PEER
from tinyexperts.ops import product_key_topk
from tinyexperts.ops.expert_mlp import portable as portable_experts
from tinyexperts.ops.expert_mlp.table_gradient_gpu import GpuTableGradient
from tinyexperts.ops.product_key_topk import portable as portable_topk
from tinyexperts.ops.row_adam.fused import row_adam_fused_

_HEADS, _EXPERTS_PER_HEAD, _QUERY_DIM = 8, 16, 128
_RETRIEVED = _HEADS * _EXPERTS_PER_HEAD
TOKENS = (4096, 1, 64, 65536)
# In the order of their worth: a run that is cut short has the first.
_TABLES = tuple((dim, num_experts) for num_experts in (2**20, 2**14, 2**22) for dim in (256, 1024, 2048))
_DTYPES = (torch.float32, torch.bfloat16)
_EXPERT_OPERATORS = torch.ops.tinyexperts
# What a dry run's tables have in place of N, which kernels take as a number.
_DRY_EXPERTS = 1024
# The largest part of the device's memory that tables, moments and gradients may take.
_MEMORY_SHARE = 0.8


def units(session: Session) -> list[Unit]:
    """Return the measurements: a table a unit for the operators, a size a unit for layers."""
    found = []
    for dim, num_experts in _TABLES:
        for dtype in _DTYPES:
            name = f"operators, D = {dim}, N = 2^{num_experts.bit_length() - 1}, {str(dtype).removeprefix('torch.')}"
            found.append(Unit(name, partial(_operators, dim, num_experts, dtype)))
        if dim == 256:
            for num_tokens in TOKENS:
                name = f"retrieval, N = 2^{num_experts.bit_length() - 1}, M = {num_tokens}"
                found.append(Unit(name, partial(_retrieval, num_experts, num_tokens)))
    if session.mode == "gpu":
        for dim, num_experts in ((256, 2**20), (1024, 2**18), (256, 2**14)):
            for num_tokens in (4096, 1, 64):
                name = f"layer, D = {dim}, N = 2^{num_experts.bit_length() - 1}, M = {num_tokens}"
                found.append(Unit(name, partial(_layers, dim, num_experts, num_tokens)))
    return found


def _fits(session: Session, num_bytes: float) -> bool:
    return session.mode != "gpu" or num_bytes < _MEMORY_SHARE * torch.cuda.mem_get_info()[1]


def _operators(dim: int, num_experts: int, dtype: torch.dtype, session: Session) -> dict[str, Any] | str:
    """Time forward pass, backward pass, the sort of the pairs and the fused update, for batches of M tokens."""
    if session.mode == "dry":
        num_experts = min(num_experts, _DRY_EXPERTS)
    elements = num_experts * 2 * dim
    # The table, its first moment and a second one a vector; and while the table is drawn, it in fp32.
    if not _fits(session, elements * (dtype.itemsize + 4 + 4)):
        return "left out: the table and its moments don't fit"
    table = torch.empty(num_experts, 2, dim, dtype=dtype, device=session.device)
    if session.runs_kernels:
        for rows in table.split(2**18):
            rows.normal_(std=dim**-0.5, generator=session.generator())
    exp_avg = torch.zeros(table.shape, dtype=torch.float32, device=session.device)
    second = {"a vector": torch.zeros(table.shape[:2], device=session.device)}
    if _fits(session, elements * (dtype.itemsize + 4 + 4 + 4)):
        second["an element"] = torch.zeros_like(exp_avg)
    return {
        f"M = {num_tokens}": _batch(table, exp_avg, second, num_tokens, session)
        for num_tokens in TOKENS
        if session.seconds_left > 0
    }


def _batch(
    table: Tensor, exp_avg: Tensor, second_moments: dict[str, Tensor], num_tokens: int, session: Session
) -> dict[str, Any]:
    num_experts, num_vectors, dim = table.shape
    x, _, ids, weights, grad_y = draw_problem(session, (num_tokens, 1, dim, _RETRIEVED), num_vectors, table.dtype)
    ids = torch.randint(num_experts, ids.shape, generator=session.generator(), device=session.device)
    touched = len(ids.unique())  # type: ignore[no-untyped-call]
    gathered = ids.numel() * num_vectors * dim * table.itemsize
    pre = _EXPERT_OPERATORS.expert_mlp(x, table, ids, weights, "gelu", None, True)[1]
    backward = partial(_EXPERT_OPERATORS.expert_mlp_backward, grad_y, x, table, ids, weights, pre, "gelu", None)
    factors = backward()[2]
    found: dict[str, Any] = {
        "forward": _gather(
            session, gathered, partial(_EXPERT_OPERATORS.expert_mlp, x, table, ids, weights, "gelu", None, True)
        ),
        "backward": _gather(session, gathered, backward),
        "sort of the pairs, ms": session.milliseconds(lambda: ids.flatten().to(torch.int32).sort(stable=True)),
        "touched rows": touched,
    }
    constants = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 1}
    for kind, second in second_moments.items():

        def update(second: Tensor = second) -> None:
            row_adam_fused_(table, exp_avg, second, GpuTableGradient(ids, factors, x, grad_y, table), **constants)

        of_row = second[0].numel() * 4
        moved = 2 * touched * (num_vectors * dim * (table.itemsize + 4) + of_row)
        found[f"sort and update, a second moment {kind}"] = _gather(session, moved, update)
    if session.mode == "gpu" and num_tokens <= 4096:
        plain = session.milliseconds(partial(portable_experts.expert_mlp, x, table, ids, weights, "gelu", None, True))
        found["plain torch, forward, over ours"] = _rounded(plain / found["forward"]["ms"])
    return found


def _gather(session: Session, num_bytes: int, call: Callable[[], object]) -> dict[str, float]:
    """Return the time of a call that must move so many bytes, and its bandwidth as a share of a copy's."""
    milliseconds = session.milliseconds(call)
    if not milliseconds:
        return {"ms": 0.0}
    bandwidth = num_bytes / milliseconds / 1e9
    found = {"ms": _rounded(milliseconds), "TB/s": _rounded(bandwidth)}
    if copied := session.results.get(COPY):
        found["of the copy"] = _rounded(bandwidth / copied)
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _retrieval(num_experts: int, num_tokens: int, session: Session) -> dict[str, float]:
    num_sub_keys = math.isqrt(num_experts)
    draw = session.generator()
    query = torch.randn(num_tokens, _HEADS, _QUERY_DIM, generator=draw, device=session.device)
    keys = torch.randn(2, num_sub_keys, _QUERY_DIM // 2, generator=draw, device=session.device)
    if session.mode == "dry" and num_tokens > 4096:
        query = query[:4096]  # torch's products of the scores do run, and take long on a CPU
    ours = session.milliseconds(partial(product_key_topk, query, keys, _EXPERTS_PER_HEAD))
    found = {"ms": _rounded(ours)}
    if session.mode == "gpu":
        plain = session.milliseconds(partial(portable_topk.product_key_topk, query, keys, _EXPERTS_PER_HEAD))
        found["plain torch over ours"] = _rounded(plain / ours)
        halves = query.view(num_tokens * _HEADS, 2, -1)
        found["the scores alone, ms"] = _rounded(
            session.milliseconds(lambda: [halves[: 2**18, half] @ keys[half].T for half in range(2)])
            * max(1, len(halves) / 2**18)
        )
    return found


def _layers(dim: int, num_experts: int, num_tokens: int, session: Session) -> dict[str, Any]:
    """Time our layer and others of the same sizes: forward pass, training step and the memory of a step."""
    x = torch.randn(num_tokens, dim, device=session.device, generator=session.generator())
    found: dict[str, Any] = {}
    for name, make in _rivals(dim, num_experts):
        try:
            with torch.device(session.device):
                contestant = make()
            found[name] = _layer(contestant, x, session)
        except (ImportError, torch.OutOfMemoryError) as error:
            found[name] = f"left out: {str(error).splitlines()[0]}"
        contestant = None  # before another takes as much
        gc.collect()
        torch.cuda.empty_cache()
    ours = found["ours"]
    for rival in (each for each in found.values() if isinstance(each, dict) and each is not ours):
        rival |= {
            f"{kind} over ours": _rounded(rival[f"{kind}, ms"] / ours[f"{kind}, ms"])
            for kind in ("forward", "step")
            if f"{kind}, ms" in rival
        }
    return found


def _rivals(dim: int, num_experts: int) -> Iterator[tuple[str, Callable[[], Contestant]]]:
    def layer() -> PEER:
        return contestants.make_layer(dim, num_experts)

    yield "ours", lambda: contestants.our_layer(layer(), "element")
    yield "ours, a second moment a vector", lambda: contestants.our_layer(layer(), "row")
    yield "PEER-pytorch, Adam", lambda: contestants.peer_pytorch(layer(), sparse=False)
    yield "PEER-pytorch, SparseAdam", lambda: contestants.peer_pytorch(layer(), sparse=True)
    yield "dense of as many active neurons", lambda: contestants.dense(dim, _RETRIEVED)
    yield "dense of 4 D neurons", lambda: contestants.dense(dim, 4 * dim)
    yield "plain torch, torch.compile", lambda: contestants.compiled_reference(layer())


def _layer(contestant: Contestant, x: Tensor, session: Session) -> dict[str, float]:
    contestant.module.train(len(x) > 1)  # query batch norm has no statistics of one token

    def forward() -> None:
        with torch.no_grad():
            contestant.forward(x)

    def step() -> None:
        contestant.step(x, x)

    found = {"forward, ms": _rounded(session.milliseconds(forward))}
    if len(x) > 1:
        found["step, ms"] = _rounded(session.milliseconds(step))
        found["peak of a step, GiB"] = _rounded(session.peak_gib(step))
    return found
