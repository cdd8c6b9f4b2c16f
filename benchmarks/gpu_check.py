"""Triton's kernels on a GPU: right, how fast, and against what; in minutes, with results written as it goes.

python benchmarks/gpu_check.py --output runs/gpu-check               # on a device with CUDA
python benchmarks/gpu_check.py --output runs/gpu-check --dry         # anywhere: compile all kernels, and run none
TRITON_INTERPRET=1 python benchmarks/gpu_check.py --output runs/gpu-check --tiny   # anywhere: small sizes, interpreted

Run it from a checkout, whose tests/gpu/harness it uses. gpu_check.json in the folder has all results. --seconds cuts
from the end; phases run in the order of their worth. The exit code is 1 if numbers were wrong or a phase broke.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # before anything of tinyexperts is imported
    CHECKOUT = Path(__file__).parents[1]
    sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests/gpu/harness")]
    # No plain torch in place of a kernel: that would be measured instead.
    os.environ["TINYEXPERTS_KERNELS"] = "triton"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as deterministic algorithms want it

import torch
from gpu_check_parts import compile_first, correctness, device_facts, graphs, times, training, tuning
from gpu_check_parts.session import Mode, Session, Unit

PHASES = ("compile", "correct", "facts", "times", "graphs", "training", "tuning")
_DRY_PHASES = ("correct", "times", "tuning")


def units_of(phase: str, session: Session, phases: list[str], target: str | None) -> list[Unit]:
    """Return the work of a phase."""
    if phase == "compile":
        dry = [each for each in phases if each in _DRY_PHASES]
        return compile_first.units(session, dry, target or compile_first.target_of_this_device()) if dry else []
    parts = {
        "correct": correctness.units,
        "facts": device_facts.units,
        "times": times.units,
        "graphs": graphs.units,
        "training": training.units,
        "tuning": tuning.units,
    }
    return parts[phase](session)


def run(session: Session, phases: list[str], *, share: tuple[int, int], target: str | None) -> bool:
    """Do the phases' work, or every n-th unit of it; returns True if nothing was wrong and nothing broke."""
    number, count = share
    broken, left_out = [], []
    work = (unit for phase in phases for unit in units_of(phase, session, phases, target))
    for unit in islice(work, number, None, count):
        if session.seconds_left <= 0:
            left_out.append(unit.name)
            continue
        try:
            value = unit.measure(session)
            if session.mode == "gpu":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception:
            broken.append(unit.name)
            session.note(f"BROKEN: {unit.name}", traceback.format_exc()[-1500:])
            if not _device_answers(session):
                session.note("stopped", "the device is lost: nothing after this can run")
                break
        else:
            if value is not None:
                session.note(unit.name, value)
    session.note("left out for want of time", left_out)
    session.note("summary", {"wrong": session.wrong, "broken": broken})
    return not session.wrong and not broken


def _device_answers(session: Session) -> bool:
    """Return False after an error that a device keeps, as one of an illegal address."""
    if session.mode != "gpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=session.device).item()
    except RuntimeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=480, help="time for all; what is left then is left out")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry", action="store_true", help="compile every launch, and run none")
    mode.add_argument("--tiny", action="store_true", help="small sizes on the CPU, under TRITON_INTERPRET=1")
    parser.add_argument("--target", default=None, help="the target of --dry: sm_90 by default")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th unit of the work, from the i-th on")
    arguments = parser.parse_args()
    number, count = map(int, arguments.share.split("/"))
    chosen: Mode = "dry" if arguments.dry else "tiny" if arguments.tiny else "gpu"
    if (chosen == "tiny") != (os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("--tiny wants TRITON_INTERPRET=1 in the environment, and nothing else does")
    if chosen == "gpu" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: use --dry, or --tiny")
    arguments.output.mkdir(parents=True, exist_ok=True)
    session = Session(chosen, arguments.output, arguments.seconds)
    phases = [phase for phase in PHASES if phase in arguments.phases]
    with ExitStack() as stack:
        launches = []
        if chosen != "gpu":
            from gpu_code_on_cpu import gpu_code_on_cpu

            stack.enter_context(gpu_code_on_cpu(checked=chosen == "tiny"))
            phases = [phase for phase in phases if phase in (_DRY_PHASES if chosen == "dry" else ("correct",))]
        if chosen == "dry":
            from dry_driver import dry_driver

            launches = stack.enter_context(dry_driver(arguments.target or "sm_90"))
        if chosen == "tiny":
            import interpreter_bf16

            interpreter_bf16.install()
        went_well = run(session, phases, share=(number, count), target=arguments.target)
        if chosen == "dry":
            session.note("launches", len(launches))
            session.note("kernels", len({launch.files["cubin"] for launch in launches if "cubin" in launch.files}))
    sys.exit(0 if went_well else 1)


if __name__ == "__main__":
    main()
