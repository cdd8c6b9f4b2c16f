"""A training step of the layer with its table in fp32 and in bf16, rounded stochastically and to nearest, on a CPU.

All in turns in one process: M = 1024 tokens, one thread, D = 256 with N = 2^20 experts and D = 1024 with N = 2^18. The
time is that of a step's phases; bf16 is compared with fp32 round by round. Run: python benchmarks/bf16_training.py
About 12 GiB of memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tinyexperts.bench.contestants import Contestant, make_layer, settle
from tinyexperts.bench.inputs import Inputs
from tinyexperts.bench.measurement import torch_threads
from tinyexperts.bench.run import describe_machine
from tinyexperts.bench.timing import Spread, interleaved
from tinyexperts.layers import PEER
from tinyexperts.optim import RowSparseAdam, deferred_gradients

PHASES = ("forward", "backward", "update")
SIZES = {256: 2**20, 1024: 2**18}


def contestants(layer: PEER, second_moment: str, generator: torch.Generator) -> dict[str, Contestant]:
    """Return the layer with both kinds of tables; those in bf16 share the table and its state."""
    table = layer.experts
    twin = copy.deepcopy(layer, {id(table): table})
    twin.store_in_bf16_()
    found = {}
    for name, module in (("fp32", layer), ("bf16", twin), ("bf16 to nearest", twin)):
        optimizer = RowSparseAdam(
            [module.experts], lr=1e-3, second_moment=second_moment, fused=True, stochastic_rounding=name == "bf16"
        )
        found[name] = Contestant(module=module, optimizers=[optimizer])
    x_MD, grad_y_MD = torch.randn(2, 64, layer.model_dim, generator=generator)
    for name in ("fp32", "bf16"):
        settle(found[name], x_MD, grad_y_MD)
    found["bf16 to nearest"].optimizers[0].state[twin.experts] = found["bf16"].optimizers[0].state[twin.experts]
    check(found, x_MD, grad_y_MD)
    return found


def check(found: dict[str, Contestant], x_MD: Tensor, grad_y_MD: Tensor) -> None:
    """Compare a step of each table in bf16 with that of the same numbers in fp32."""
    experts = found["fp32"].module.experts
    with torch.no_grad():
        rows = found["fp32"].module.route(x_MD).ids.unique()
    for name in ("bf16", "bf16 to nearest"):
        narrow = found[name].module.experts
        with torch.no_grad():
            experts[rows] = narrow[rows].float()
        for each in (found["fp32"], found[name]):
            for state in each.optimizers[0].state.values():
                for moment in (state["exp_avg"], state["exp_avg_sq"]):
                    moment[rows] = 0.0
                state["step"].zero_()
            with deferred_gradients(each.optimizers):
                each.module(x_MD).backward(grad_y_MD)
            each.optimizers[0].step()
            each.module.zero_grad()
        wanted, got = experts.detach()[rows], narrow.detach()[rows].float()
        if not (got - wanted).abs().le(wanted.abs() * 2**-7 + 1e-6).all() or torch.equal(got, wanted):
            raise SystemExit(f"a step of the table in {name} is not that in fp32, rounded")


def measure(d_model: int, num_experts: int, num_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Return the seconds of each phase, and the ratios of fp32's to those of bf16."""
    results = []
    generator = torch.Generator().manual_seed(0)
    layer = make_layer(d_model, num_experts)
    inputs = Inputs(num_tokens, d_model, trains=True, generator=generator)
    with torch.no_grad():
        num_touched = layer.eval().route(inputs.next()).ids.unique().numel()
    layer.train()
    for second_moment in ("element", "row"):
        found = contestants(layer, second_moment, generator)
        calls = {name: each.step_of(inputs) for name, each in found.items()}
        seconds = interleaved(calls, repeats)
        for name, times in seconds.items():
            phases = dict(zip(PHASES, times.T, strict=True)) | {"step": times.sum(1)}
            wide = dict(zip(PHASES, seconds["fp32"].T, strict=True)) | {"step": seconds["fp32"].sum(1)}
            results.append(
                {
                    "d_model": d_model,
                    "num_experts": num_experts,
                    "num_tokens": num_tokens,
                    "touched_rows": num_touched,
                    "second_moment": second_moment,
                    "table": name,
                    "seconds": {phase: asdict(Spread.of(each)) for phase, each in phases.items()},
                    "fp32_over_it": {phase: asdict(Spread.of(wide[phase] / phases[phase])) for phase in phases},
                }
            )
        del found, calls
        gc.collect()
    return results


def table_of(results: list[dict[str, Any]]) -> Table:
    """Return the results for the terminal."""
    table = Table("D", "N", "second moment", "table", title="ms, and fp32's over it (quartiles)", title_justify="left")
    for phase in (*PHASES, "step"):
        table.add_column(phase, justify="right", no_wrap=True)
    for each in results:
        texts = []
        for phase in (*PHASES, "step"):
            milliseconds, ratio = 1e3 * each["seconds"][phase]["median"], each["fp32_over_it"][phase]
            quartiles = f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})"
            texts.append(f"{milliseconds:.1f}" + (f", {quartiles}" if each["table"] != "fp32" else ""))
        table.add_row(f"{each['d_model']}", f"{each['num_experts']:,}", each["second_moment"], each["table"], *texts)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="rounds that a median is taken over")
    parser.add_argument("--widths", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--num-tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bf16_training.json"))
    arguments = parser.parse_args()
    results = []
    with torch_threads(1):
        for width in arguments.widths:
            results += measure(width, SIZES[width], arguments.num_tokens, arguments.repeats)
            gc.collect()
    report = {"machine": describe_machine(), "repeats": arguments.repeats, "results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=180).print(table_of(results))


if __name__ == "__main__":
    main()
