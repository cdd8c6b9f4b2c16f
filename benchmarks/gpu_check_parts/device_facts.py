"""What the device can do: the measures that times are compared with."""

from __future__ import annotations

import platform

import torch

from gpu_check_parts.session import Session, Unit
from tinyexperts.ops.kernels_on import kernels_on

COPY = "copy, TB/s"


def units(session: Session) -> list[Unit]:
    """Return the facts; there are none where nothing runs."""
    if session.mode != "gpu":
        return []
    facts = {
        "device": _device,
        COPY: _copy,
        "sum of 16 MiB in L2, TB/s": _read_from_l2,
        "fp32 scores of 32768 queries [64] and 1024 sub-keys, ms": _scores,
        "torch.topk(65536 x 1024, k = 17), ms": _topk,
        "stable sort of int32, ms": _sort,
    }
    return [Unit(name, measure) for name, measure in facts.items()]


def _device(session: Session) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(session.device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "torch": str(torch.__version__),
        "CUDA": str(torch.version.cuda),
        "python": platform.python_version(),
        "kernels": kernels_on(torch.device("cuda", torch.cuda.current_device())),
    }


def _copy(session: Session) -> float:
    source = torch.empty(2**30, device=session.device)
    target = torch.empty_like(source)
    return 8 * 2**30 / session.milliseconds(lambda: target.copy_(source)) / 1e9


def _read_from_l2(session: Session) -> float:
    """Return the bandwidth of sums one after the other, which find the numbers in L2."""
    numbers = torch.ones(2**22, device=session.device)

    def many() -> None:
        for _ in range(100):
            numbers.sum()

    return 100 * 4 * 2**22 / session.milliseconds(many) / 1e9


def _scores(session: Session) -> dict[str, float]:
    query, keys = torch.randn(32768, 64, device=session.device), torch.randn(64, 1024, device=session.device)
    times = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        times[precision] = session.milliseconds(lambda: query @ keys)
    torch.set_float32_matmul_precision("highest")
    return times


def _topk(session: Session) -> float:
    scores = torch.randn(65536, 1024, device=session.device)
    return session.milliseconds(lambda: scores.topk(17))


def _sort(session: Session) -> dict[str, float]:
    times = {}
    for exponent in (13, 19, 23, 25):
        ids = torch.randint(2**20, (2**exponent,), device=session.device, dtype=torch.int32)
        times[f"2^{exponent}"] = session.milliseconds(lambda ids=ids: ids.sort(stable=True))
    return times
