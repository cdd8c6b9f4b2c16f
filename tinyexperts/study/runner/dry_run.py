"""The dry run of a study: every run with its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tinyexperts.planning import Devices, plan
from tinyexperts.planning.devices import UTILIZATION
from tinyexperts.planning.model_costs import account
from tinyexperts.report.numbers import format_count
from tinyexperts.study.grid import GridRun

# The GPU of the hours.
GPU = "H100 SXM"
_ONE_GPU = Devices.parse("1x80GB")
# What small models reach in training on two shared cores: the median run of the study at laptop scale.
_CPU_FLOPS = 4.5e10
_SCALES_OF_CPUS = ("minute", "laptop")


def print_plan(name: str, scale: str, question: str, runs: Sequence[GridRun], *, is_tuned: bool) -> None:
    """Print a table of the expected runs of a study: untuned, the last budget at the smallest width.

    Args:
        name (str): the name of the study.
        scale (str): the name of its scale.
        question (str): the question of the study.
        runs (Sequence[GridRun]): the expected runs.
        is_tuned (bool): True if the study has runs that depend on the results of others.
    """
    console = Console(width=max(110, Console().width))  # narrower, names would be cut to pieces
    console.print(f"{name} at {scale} scale: {question}", highlight=False)
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for column in ("FLOPs", "steps", "tokens", "active", "total", "router", "memory", "hours"):
        table.add_column(column, justify="right", no_wrap=True)
    on_cpu = scale in _SCALES_OF_CPUS
    gpu_flops = _ONE_GPU.flops * UTILIZATION
    total_flops = num_runs = num_too_large = 0.0
    for run in track(runs, console=Console(stderr=True), transient=True):
        cost = account(run.config)
        hours = cost.training_flops / (_CPU_FLOPS / 2 if on_cpu else gpu_flops) / 3600
        (alone,) = plan(replace(run.config, device="cpu" if on_cpu else "cuda"), _ONE_GPU)
        fits = on_cpu or alone.fits(_ONE_GPU)
        num_too_large += not fits
        table.add_row(
            run.name,
            f"{cost.training_flops:.2e}",
            f"{cost.num_steps:,}",
            format_count(cost.num_tokens),
            format_count(cost.parameters_active),
            format_count(cost.parameters_total),
            f"{cost.forward_flops.router / cost.forward_flops.total:.1%}",
            f"{alone.memory.total / 2**30:.2f} GiB" + ("" if fits else " !"),
            f"{hours:.2g}",
        )
        total_flops, num_runs = total_flops + cost.training_flops, num_runs + 1
    console.print(table)
    core_hours, gpu_hours = total_flops / _CPU_FLOPS / 3600, total_flops / gpu_flops / 3600
    tuned = " Settings that are best at the last value tried are tuned further; those runs are not counted here."
    console.print(
        f"{num_runs:,.0f} runs, {total_flops:.2e} training FLOPs, {gpu_hours:,.1f} hours on one {GPU} at "
        f"{UTILIZATION:.0%} of its {_ONE_GPU.flops / 1e12:.0f} TFLOP/s, which only large models reach, "
        f"{core_hours:,.1f} on two CPU cores at {_CPU_FLOPS / 2:.2g} FLOP/s each. Speeds are assumed; memory is that "
        f"of one {'CPU process' if on_cpu else 'GPU'}, as `tinyexperts plan` counts it, and a run's hours are those of "
        f"one {'core' if on_cpu else 'GPU'}.{tuned if is_tuned else ''}",
        highlight=False,
        soft_wrap=True,
    )
    if num_too_large:
        console.print(
            f"{num_too_large:.0f} runs, marked !, do not fit one GPU of 80 GB, and a study gives each run one device: "
            "they would fail, and the others continue. `tinyexperts plan` says how many devices such a run wants.",
            highlight=False,
            soft_wrap=True,
        )
