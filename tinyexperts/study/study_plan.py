"""The dry run of a study: every run with what it will cost."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from tinyexperts.study.grids.accounting import account
from tinyexperts.study.grids.grid import Study, runs_if_all_end_alike
from tinyexperts.study.reports.report import format_count

# What hours are told for: bf16 FLOPs a second without sparsity, and the share of them that a well-fed training reaches.
GPU = "H100 SXM"
_GPU_FLOPS = 989e12
_UTILISATION = 0.4
# What small models reach in training on two cores of a server's CPU.
_CPU_FLOPS = 1e11


def print_plan(study: Study) -> None:
    """A table of all runs, as they stand before any has been run: untuned, the last budget at the smallest width."""
    console = Console(width=max(110, Console().width))  # narrower, names would be cut to pieces
    console.print(f"{study.name} at {study.scale} scale: {study.question}", highlight=False)
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for column in ("FLOPs", "steps", "tokens", "active", "total", "router", "memory", "hours"):
        table.add_column(column, justify="right", no_wrap=True)
    total_flops = total_hours = num_runs = 0.0
    for run in runs_if_all_end_alike(study):
        cost = account(run.config)
        hours = cost.training_flops / (_GPU_FLOPS * _UTILISATION) / 3600
        table.add_row(
            run.name,
            f"{cost.training_flops:.2e}",
            f"{cost.num_steps:,}",
            format_count(cost.num_tokens),
            format_count(cost.parameters_active),
            format_count(cost.parameters_total),
            f"{cost.forward_flops.router / cost.forward_flops.total:.1%}",
            f"{cost.training_memory / 2**30:.1f} GiB",
            f"{hours:.2g}",
        )
        total_flops, total_hours, num_runs = total_flops + cost.training_flops, total_hours + hours, num_runs + 1
    console.print(table)
    core_hours = total_flops / _CPU_FLOPS / 3600
    console.print(
        f"{num_runs:,.0f} runs, {total_flops:.2e} training FLOPs, {total_hours:,.1f} hours on one {GPU} at "
        f"{_UTILISATION:.0%} of its {_GPU_FLOPS / 1e12:.0f} TFLOP/s, {core_hours:,.1f} on two CPU cores "
        f"at {_CPU_FLOPS / 2:.0e} FLOP/s each (speeds are assumed, memory is estimated)",
        highlight=False,
        soft_wrap=True,
    )
