"""Other constants of the experts' kernels than the table of tinyexperts/ops/gpu/launch.py has, and what they gain."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from gpu_check_parts.correctness import draw_problem
from gpu_check_parts.session import Session, Unit
from tinyexperts.ops.gpu.launch import Launch, launch_for, next_power_of_2

_ROWS, _WARPS = (1, 2, 4, 8), (1, 2, 4, 8, 16)
_NUM_SHOWN = 4
_PLACES = [f"tinyexperts.ops.expert_mlp.{module}.launch_for" for module in ("gpu", "gpu_sums")]


def units(session: Session) -> list[Unit]:
    """Return the searches, one for the experts and one for the sums by expert at each size."""
    sizes = [(4096, 2**20, 256, 128), (4096, 2**18, 1024, 128), (65536, 2**20, 256, 128)]
    if session.mode == "dry":
        sizes = [(4096, 1024, 256, 128), (4096, 1024, 1024, 128)]
    found = []
    for size, dtype in product(sizes, (torch.bfloat16, torch.float32)):
        name = f"tuning, M = {size[0]}, D = {size[2]}, {str(dtype).removeprefix('torch.')}"
        found.append(Unit(name, partial(_tune, size, dtype)))
    return found


def _tune(size: tuple[int, int, int, int], dtype: torch.dtype, session: Session) -> dict[str, Any]:
    x, table, ids, weights, grad_y = draw_problem(session, size, 2, dtype)
    ids = torch.randint(len(table), ids.shape, generator=session.generator(), device=session.device)
    operators = torch.ops.tinyexperts
    y, pre = operators.expert_mlp(x, table, ids, weights, "gelu", None, True)
    saved = x, table, ids, weights
    factors = operators.expert_mlp_backward(grad_y, *saved, pre, "gelu", None)[2]
    calls = {
        "forward": partial(operators.expert_mlp, *saved, "gelu", None, True),
        "backward": partial(operators.expert_mlp_backward, grad_y, *saved, pre, "gelu", None),
        "rows of the gradient": partial(operators.expert_mlp_gradient_rows, ids, factors, x, grad_y, table),
    }
    usual = launch_for(size[2], num_vectors=2)
    found: dict[str, Any] = {"usual (rows, warps)": (usual.rows, usual.warps)}
    block = max(usual.block, next_power_of_2(size[2]))
    for name, call in calls.items():
        times = []
        # Sums by expert take one row at a time.
        for rows, warps in product(_ROWS if name != "rows of the gradient" else (usual.rows,), _WARPS):
            if session.seconds_left <= 0 or not 1 <= block // (32 * warps) <= 32:
                continue
            launch = Launch(block=block, rows=rows, warps=warps)
            with ExitStack() as stack:
                for place in _PLACES:
                    stack.enter_context(patch(place, lambda *_, launch=launch, **__: launch))
                try:
                    milliseconds = session.milliseconds(call, 0.05)
                    if name == "forward" and session.runs_kernels:
                        torch.testing.assert_close(call()[0], y, rtol=1e-2, atol=1e-2)
                except Exception as error:  # too many registers, say: the others are measured
                    found[f"{name} of {(rows, warps)} fails"] = f"{type(error).__name__}: {error}"[:200]
                    continue
            times.append((round(milliseconds, 4), rows, warps))
        found[f"{name}: ms, rows, warps"] = sorted(times)[:_NUM_SHOWN]
        found[f"{name} as usual: ms"] = [each[0] for each in times if each[1:] == (usual.rows, usual.warps)]
    return found
