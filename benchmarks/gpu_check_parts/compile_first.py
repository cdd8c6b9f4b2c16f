"""All kernels compiled by many processes at once, which find no device and need none: Triton keeps them on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from gpu_check_parts.session import Session, Unit

_SCRIPT = Path(__file__).parents[1] / "gpu_check.py"
_LEAST_SECONDS = 20


def units(session: Session, phases: list[str], target: str) -> list[Unit]:
    """Return the compilation of other phases' kernels for a target; there is none where nothing runs."""
    if session.mode != "gpu":
        return []
    return [Unit(f"compilation for {target}", partial(_compile, phases, target))]


def target_of_this_device() -> str:
    """Return the name of the device's target: sm_90."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _compile(phases: list[str], target: str, session: Session) -> dict[str, object]:
    count = os.cpu_count() or 1
    seconds = max(_LEAST_SECONDS, session.seconds_left / 4)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(_SCRIPT),
        "--dry",
        "--target",
        target,
        "--seconds",
        str(seconds),
        "--phases",
        *phases,
    ]
    processes = []
    for number in range(count):
        folder = session.output / f"compile-{number}"
        folder.mkdir(exist_ok=True)
        with open(folder / "output.txt", "w") as output:
            processes.append(
                subprocess.Popen(
                    [*command, "--share", f"{number}/{count}", "--output", str(folder)],
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
            )
    codes = [process.wait() for process in processes]
    return {"processes": count, "failed": [number for number, code in enumerate(codes) if code]}
