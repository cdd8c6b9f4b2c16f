"""Trains a few steps in a process of its own and prints the most memory that they took, in bytes.

Called as: python memory_of_a_run.py CONFIG.json WARM-UP.json
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tinyexperts.training.config_file import from_json
from tinyexperts.training.distributed.launch import init_distributed
from tinyexperts.training.run import make_run
from tinyexperts.training.step import optimizer_step


def status(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    large, small = (from_json(Path(path).read_bytes()) for path in sys.argv[1:])
    with init_distributed(large) as ranks:
        run = make_run(small, ranks)  # loads the kernels and what torch loads late
        for step in range(2):
            optimizer_step(run, step)
        del run
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        run = make_run(large, ranks)
        for step in range(3):
            optimizer_step(run, step)
        print(status("VmHWM") - before)


if __name__ == "__main__":
    main()
