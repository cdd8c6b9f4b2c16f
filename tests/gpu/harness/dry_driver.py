"""A driver of Triton's for machines without a GPU: each launch is specialised and compiled as a real one, and not run.

    with dry_driver("sm_90") as launches:
        kernel[grid](tensor_on_the_cpu, 7)
    launches[0].code.registers

What Triton makes of the arguments (an int that is 1 becomes a constant, pointers that 16 divides get wide loads) is
then made here as there. The tensors keep what they hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from machine_code import MachineCode, read_machine_code
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

KIB = 1024
# Each target, and the shared memory that a block may have there.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
LARGEST_GRID = (2**31 - 1, 65535, 65535)

# Triton keeps compiled kernels by the number of the device: each driver is a device of its own.
_device_numbers = itertools.count(1000)


@dataclass(frozen=True)
class Launch:
    """A launch that was compiled and not run."""

    kernel: str
    target: str
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int
    files: dict[str, Path]
    """What Triton kept of the kernel, by the name's ending: ptx, cubin, ttgir, ..."""

    @property
    def code(self) -> MachineCode:
        """The machine code; read at the first use."""
        return read_machine_code(self.files["cubin" if "cubin" in self.files else "amdgcn"])


@contextmanager
def dry_driver(target: str) -> Iterator[list[Launch]]:
    """Compile for a target of TARGETS what is launched in the scope; gives the launches so far."""
    driver = _DryDriver(target)
    hooks, before = triton.knobs.runtime.kernel_load_end_hook, triton.runtime.driver._active
    hooks.add(_keep_files)
    triton.runtime.driver.set_active(driver)
    try:
        yield driver.launches
    finally:
        triton.runtime.driver.set_active(before)
        hooks.remove(_keep_files)


class _Function:
    """What a driver knows of a loaded kernel."""

    files: dict[str, Path]


def _keep_files(module: None, function: object, name: str, metadata_group: dict[str, str], hash: str) -> None:
    if isinstance(function, _Function):
        function.files = {Path(file).suffix[1:]: Path(path) for file, path in metadata_group.items()}


class _DryDriver(DriverBase):
    def __init__(self, target: str) -> None:
        self.name = target
        self.target, self.max_shared_bytes = TARGETS[target]
        self.device = next(_device_numbers)
        self.launches: list[Launch] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return the function that launches a compiled kernel."""

        def launch(x: int, y: int, z: int, stream: int, function: _Function, *_: object) -> None:
            if any(size > largest for size, largest in zip((x, y, z), LARGEST_GRID, strict=True)):
                raise ValueError(f"{source.name}: a grid of {(x, y, z)} is beyond {LARGEST_GRID}")
            self.launches.append(
                Launch(source.name, self.name, (x, y, z), metadata.num_warps, metadata.shared, function.files)
            )

        return launch

    # What Triton calls `utils`.

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[object, _Function, int, int, int]:
        """Return a module, its function, its registers, its spills and the most threads."""
        return object(), _Function(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Do nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what Triton asks of a device."""
        return {"max_shared_mem": self.max_shared_bytes, "warpSize": self.target.warp_size, "multiprocessor_count": 132}

    # What Triton calls a driver.

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs, so nothing is timed")
