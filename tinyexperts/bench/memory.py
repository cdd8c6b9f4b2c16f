"""The memory that a setting needs, estimated before it is measured, and the peak of this process."""

from __future__ import annotations

from pathlib import Path

GIB = 2**30


def gib(num_bytes: float) -> str:
    """Write bytes for readers, as "14.2 GiB"."""
    return f"{num_bytes / GIB:.3g} GiB"


def table_bytes(d_model: int, num_experts: int) -> int:
    """Return the bytes of a table [N, 2, D] in fp32; PEER-pytorch's two tables hold as much."""
    return num_experts * 2 * d_model * 4


def needed_bytes(second_moment: str, table: int) -> int:
    """Return the bytes of a table that has `table` bytes, together with RowSparseAdam's state for it."""
    return (3 if second_moment == "element" else 2) * table


def restart_peak() -> None:
    """Measure the peak from now on, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no Linux, or a sandbox: the peak then counts from the start of the process, or isn't known
        return


def peak_resident_bytes() -> int | None:
    """Return the most memory that the process held since `restart_peak`; None where the system doesn't say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
