"""What the parts of the check share: the device, the time that is left, and the file that results are written to."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tinyexperts.files import write_atomically

Mode = Literal["gpu", "dry", "tiny"]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""The largest relative error (of the norm) of an output of a type."""
# Written between two calls that are timed, so that the second finds nothing of the first in the L2 cache.
_FLUSHED_BYTES = 256 << 20


@dataclass(frozen=True)
class Unit:
    """A piece of the work that is done whole or not at all."""

    name: str
    measure: Callable[[Session], Any]
    """What is written of it; None for nothing."""


@dataclass
class Session:
    """A run of the check."""

    mode: Mode
    """gpu: on a device. dry: kernels are compiled and not run. tiny: they are interpreted, at small sizes."""
    output: Path
    seconds: float
    device: torch.device = field(init=False)
    results: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """The units whose numbers are wrong."""
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if self.mode == "gpu" else "cpu")

    @property
    def runs_kernels(self) -> bool:
        """False where outputs hold nothing."""
        return self.mode != "dry"

    @property
    def seconds_left(self) -> float:
        """The seconds of `seconds` that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def note(self, name: str, value: Any) -> None:
        """Print a result and write all results so far."""
        self.results[name] = value
        print(f"[{time.monotonic() - self.started:5.0f} s] {name}: {value}", flush=True)
        write_atomically(self.output / "gpu_check.json", json.dumps(self.results, indent=1) + "\n")

    def compare(self, name: str, errors: dict[str, float], tolerances: dict[str, float]) -> None:
        """Note errors, and which are beyond their tolerance or not finite."""
        beyond = [each for each, error in errors.items() if not error <= tolerances[each]]
        if beyond:
            self.wrong.append(name)
            self.note(f"WRONG: {name}", {each: (errors[each], tolerances[each]) for each in beyond})
        worst = self.results.setdefault("largest errors", {})
        for each, error in errors.items():
            kind = f"{each}, tolerance {tolerances[each]:g}"
            worst[kind] = max(worst.get(kind, 0.0), error if math.isfinite(error) else 1e30)

    def generator(self, seed: int = 0) -> torch.Generator:
        """Return a source of random numbers on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def milliseconds(self, call: Callable[[], object], budget_seconds: float = 0.1) -> float:
        """Return the median time of a call with a cold L2 cache, as a stream sees it; 0 where nothing runs."""
        if self.mode != "gpu":
            call()
            return 0.0
        call()
        torch.cuda.synchronize()
        flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        times: list[float] = []
        stop = time.monotonic() + budget_seconds
        while len(times) < 3 or (time.monotonic() < stop and len(times) < 50):
            flushed.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def peak_gib(self, call: Callable[[], object]) -> float:
        """Return the most memory that torch allocates during a call, in GiB."""
        if self.mode != "gpu":
            call()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its like return with NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference by that of the truth; infinity for numbers that are not finite."""
    found, truth = found.detach().double(), truth.detach().double()
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return math.inf
    difference, norm = float((found - truth).norm()), float(truth.norm())
    return 0.0 if difference == 0 else difference / norm if norm else math.inf


def same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> float:
    """Return 0 if both have the same numbers, else infinity."""
    return 0.0 if all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) else math.inf
