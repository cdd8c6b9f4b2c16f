"""What a compiler made of a kernel: registers, spills, the widths of its loads; read from the files Triton keeps.

NVIDIA's code is read by the cuobjdump that Triton brings with it, AMD's from the assembly.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_BYTES_OF_AMD = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2}


@dataclass(frozen=True)
class MachineCode:
    """The code of a kernel for one target."""

    registers: int
    """Of a thread (on AMD vector registers)."""
    spilled_bytes: int
    """Of a thread's memory for what has no register."""
    instructions: Counter[str]
    """How many of each the code has, loops counted once; names in full: LDG.E.128, global_load_dwordx4."""

    @property
    def spills(self) -> int:
        """Instructions that move what has no register, or the bytes they need where there is none (0: no spill)."""
        local = ("LDL", "STL", "scratch_")
        return sum(n for name, n in self.instructions.items() if name.startswith(local)) or self.spilled_bytes

    def count(self, *prefixes: str) -> int:
        """Return how many instructions begin with one of the prefixes."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))

    def global_loads(self) -> Counter[int]:
        """Return how many loads of global memory there are of each width in bytes, with those into shared memory."""
        return self._widths("LDG.", "LDGSTS.", "global_load_", "buffer_load_")

    def global_stores(self) -> Counter[int]:
        """Return how many stores to global memory there are of each width in bytes."""
        return self._widths("STG.", "global_store_", "buffer_store_")

    def _widths(self, *prefixes: str) -> Counter[int]:
        widths: Counter[int] = Counter()
        for name, number in self.instructions.items():
            if name.startswith(prefixes):
                widths[_width(name)] += number
        return widths


def _width(instruction: str) -> int:
    """Return the bytes that a load or store moves for a thread."""
    if instruction.isupper():
        parts = instruction.split(".")
        bits = next((int(part) for part in parts if part in ("64", "128", "256")), 32)
        narrow = next((int(part[1:]) for part in parts if part in ("U8", "S8", "U16", "S16")), bits)
        return narrow // 8
    kind = instruction.split("_")[2]
    if found := re.fullmatch(r"dword(?:x(\d))?|b(\d+)", kind):
        return int(found[2]) // 8 if found[2] else 4 * int(found[1] or 1)
    return _BYTES_OF_AMD[kind]


@functools.cache
def read_machine_code(path: Path) -> MachineCode:
    """Read a .cubin, or AMD's assembly (.amdgcn)."""
    if path.suffix == ".cubin":
        return _read_cubin(path)
    text = path.read_text()

    def of_kernel(name: str) -> int:
        return max(int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", text))

    spilled = 4 * of_kernel("vgpr_spill_count") + of_kernel("private_segment_fixed_size")
    names = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.MULTILINE)
    return MachineCode(of_kernel("vgpr_count"), spilled, Counter(names))


def _read_cubin(path: Path) -> MachineCode:
    usage = subprocess.run([_CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    listing = subprocess.run([_CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", listing, re.MULTILINE)
    return MachineCode(int(found[1]), int(found[2]) + int(found[3]), Counter(names))
