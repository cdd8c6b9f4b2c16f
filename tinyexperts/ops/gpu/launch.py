"""The constants with which Triton's kernels are launched: a small table by the number of columns, and no search.

A program holds whole vectors of D elements in registers. A warp has 256 columns of them: sums over D then stay inside a
warp up to D = 256, and each lane loads 16 bytes at once (bf16), or twice (fp32). Four rows are loaded together, so that
enough bytes are under way.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DIM = 8192
"""The widest vector that a program holds in registers."""
MAX_REGISTERS = 168
"""The registers that a lane may take.

12 warps of a multiprocessor are then resident. Each has four rows of 512 bytes or more under way, 24 KB in all, about
what the memory of an H100 needs to be busy (3.3 TB/s x 0.8 us / 132).
"""

_COLUMNS_PER_WARP = 256
_MIN_BLOCK = 32
_MAX_WARPS = 16


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The shape of a program's work."""

    block: int
    """Columns of a vector that a program holds, a power of two."""
    rows: int
    """Vectors of experts that are loaded together."""
    warps: int
    """Warps of a program."""


def launch_for(dim: int, *, num_vectors: int = 1, columns_per_number: int = 1) -> Launch:
    """Return the launch for vectors of D elements.

    Args:
        dim (int): numbers that are stored for a vector: D, or ceil(D / 2) bytes of a table in 4 bits.
        num_vectors (int): vectors of an expert that are held at the same time.
        columns_per_number (int): columns that a stored number has, 2 for 4 bits.
    """
    block = max(_MIN_BLOCK, next_power_of_2(dim))
    warps = min(max(block * columns_per_number // _COLUMNS_PER_WARP, 1), _MAX_WARPS)
    # A lane has more columns where there are no more warps, and twice as many numbers as bytes of 4 bits: fewer rows at
    # a time then leave the registers enough. Nothing spills (tests/gpu/compiled).
    held = block * columns_per_number * num_vectors // (warps * _COLUMNS_PER_WARP)
    fewer = held > 3 or (columns_per_number == 2 and num_vectors > 1)
    return Launch(block=block, rows=1 if held > 4 else 2 if fewer else 4, warps=warps)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not less than a positive number."""
    return 1 << (number - 1).bit_length()
