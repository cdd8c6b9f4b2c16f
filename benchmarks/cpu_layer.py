"""The README's claims about the layer on a CPU, measured: each goal with the ratio that this machine gives.

One thread, M = 1024 tokens, D = 256 and N = 2^20 where a goal doesn't say otherwise; ratios to PEER-pytorch
(pip install PEER-pytorch). Run: python benchmarks/cpu_layer.py
About 20 GiB of memory; what does not fit is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tinyexperts import PEER
from tinyexperts.bench import memory
from tinyexperts.bench.baselines import BaselineName
from tinyexperts.bench.check import check_kernels
from tinyexperts.bench.contestants import make_layer, our_layer, settle
from tinyexperts.bench.inputs import Inputs
from tinyexperts.bench.measurement import Measurement, measure_setting, to_json, torch_threads
from tinyexperts.bench.run import describe_machine
from tinyexperts.bench.tables import measure_tables, stored_tables
from tinyexperts.bench.timing import Spread, interleaved
from tinyexperts.report.numbers import MISSING

PEER_PYTORCH: BaselineName = "peer_pytorch_adam"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the layers that are measured; a layer's ids are those that its router chooses."""

    d_model: int = 256
    num_experts: int = 2**20
    wide_d_model: int = 1024
    wide_num_experts: int = 2**18
    few_experts: int = 2**14
    many_experts: int = 2**22
    num_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A goal, with the value that must be reached and the one that is aimed at."""

    name: str
    must: float
    aim: float
    at_most: bool = False
    """True if lower values are better."""
    write: Callable[[float], str] = "{:.3g}x".format

    def reached(self, value: float) -> str:
        """Say what a value reaches: aim, must or missed."""
        sign = -1 if self.at_most else 1
        return "aim" if sign * value >= sign * self.aim else "must" if sign * value >= sign * self.must else "missed"


def _fraction(value: float) -> str:
    return f"1/{1 / value:.3g}"


GOALS = {
    "share": Goal(name="experts forward, share of the random-row limit", must=0.80, aim=0.95, write="{:.1%}".format),
    "forward": Goal(name="layer forward", must=5, aim=8),
    "one_token": Goal(name="layer forward, 1 token", must=6, aim=15),
    "step": Goal(name="training step, against dense fused Adam", must=12, aim=25),
    "wide_step": Goal(name="training step, D = 1024, N = 2^18", must=9, aim=15),
    "many_experts": Goal(name="training step, N = 2^22 over 2^14, 2nd moment a row", must=4, aim=2, at_most=True),
    "activations": Goal(
        name="activation memory a token, over PEER-pytorch's", must=1 / 20, aim=1 / 60, at_most=True, write=_fraction
    ),
    "int8": Goal(name="experts forward, D = 1024, int8 table against fp32", must=2, aim=3),
    "bf16": Goal(name="experts forward, D = 1024, bf16 table against fp32", must=1.7, aim=2),
    "int4": Goal(name="experts forward, D = 1024, table in 4 bits against fp32", must=3, aim=4),
}


def measure_goals(
    sizes: Sizes, *, repeats: int, show_progress: Callable[[str], None]
) -> tuple[dict[str, Spread], list[Measurement]]:
    """Measure every goal that can be; return its median and quartiles, and the settings' measurements in full."""
    results = []
    layer = make_layer(sizes.d_model, sizes.num_experts)
    for num_tokens in (sizes.num_tokens, 1):
        results.append(_against_peer_pytorch(layer, num_tokens, repeats, show_progress))
    del layer
    gc.collect()
    layer = make_layer(sizes.wide_d_model, sizes.wide_num_experts)
    results.append(_against_peer_pytorch(layer, sizes.num_tokens, repeats, show_progress))
    show_progress("experts, tables of fewer bits")
    narrow = _narrow_ratios(layer, sizes.num_tokens, repeats)
    del layer
    gc.collect()
    batch = results[0]
    theirs, theirs_at_one_token, theirs_wide = (each.baselines.get(PEER_PYTORCH) for each in results)
    measured = {
        "share": batch.operator["uniform"].share_of_limit,
        "forward": theirs.forward_ratio if theirs else None,
        "one_token": theirs_at_one_token.forward_ratio if theirs_at_one_token else None,
        "step": theirs.step_ratio if theirs else None,
        "wide_step": theirs_wide.step_ratio if theirs_wide else None,
        **narrow,
    }
    if batch.layer.activation_bytes_per_token and theirs and theirs.activation_bytes_per_token:
        ratio = batch.layer.activation_bytes_per_token / theirs.activation_bytes_per_token
        measured["activations"] = Spread(median=ratio, lower_quartile=ratio, upper_quartile=ratio)
    if memory.needed_bytes("row", memory.table_bytes(sizes.d_model, sizes.many_experts)) < available_bytes():
        show_progress("many experts and few")
        measured["many_experts"] = _many_experts_ratio(sizes, repeats)
    return {name: spread for name, spread in measured.items() if spread is not None}, results


def _against_peer_pytorch(
    layer: PEER, num_tokens: int, repeats: int, show_progress: Callable[[str], None]
) -> Measurement:
    num_experts, _, d_model = layer.experts.shape
    return measure_setting(
        layer,
        num_tokens=num_tokens,
        threads=1,
        ids=("uniform",),
        repeats=repeats,
        max_bytes=memory.table_bytes(d_model, num_experts) + available_bytes(),
        baselines=(PEER_PYTORCH,),
        show_progress=lambda name: show_progress(f"D = {d_model}, N = {num_experts:,}, M = {num_tokens}: {name}"),
    )


def _narrow_ratios(layer: PEER, num_tokens: int, repeats: int) -> dict[str, Spread]:
    """Compare the experts' forward pass with fp32 tables to those of fewer bits; tokens are fp32."""
    measured = measure_tables(
        stored_tables(layer.experts.detach()),
        num_tokens=num_tokens,
        retrieved=layer.retrieved_per_token,
        activation=layer.activation,
        threads=1,
        repeats=repeats,
    )
    return {"int4" if kind == "4 bits" else kind: ratio for kind, ratio in measured.ratio.items() if kind != "fp32"}


def _many_experts_ratio(sizes: Sizes, repeats: int) -> Spread:
    """Return the time of our training step with many experts over that with few."""
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs(sizes.num_tokens, sizes.d_model, trains=True, generator=generator)
    calls = {}
    with torch_threads(1):
        for num_experts in (sizes.few_experts, sizes.many_experts):
            layer = make_layer(sizes.d_model, num_experts)
            check_kernels(layer, sizes.num_tokens, ("row",), generator)
            ours = our_layer(layer, "row")
            settle(ours, inputs.next(), inputs.grad_y_MD)
            calls[str(num_experts)] = ours.step_of(inputs)
        few, many = interleaved(calls, repeats).values()
    return Spread.of(many.sum(1) / few.sum(1))


def available_bytes() -> float:
    """Return the memory that can be taken without swapping, less a reserve; infinite if the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")) - memory.GIB


def report_of(measured: dict[str, Spread]) -> list[dict[str, Any]]:
    """Return the goals with what was measured, for JSON; `reached` is aim, must, missed or not measured."""
    return [
        {
            "goal": goal.name,
            "must": goal.must,
            "aim": goal.aim,
            "at_most": goal.at_most,
            "measured": asdict(measured[name]) if name in measured else None,
            "reached": goal.reached(measured[name].median) if name in measured else "not measured",
        }
        for name, goal in GOALS.items()
    ]


def table_of(measured: dict[str, Spread]) -> Table:
    """Return the goals for the terminal."""
    table = Table("goal", title="The layer on a CPU: median (quartiles); ratios to PEER-pytorch", title_justify="left")
    for heading in ("must", "aim", "measured", "reached"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (name, goal), line in zip(GOALS.items(), report_of(measured), strict=True):
        text = MISSING
        if name in measured:
            median, lower, upper = map(goal.write, astuple(measured[name]))
            text = median if lower == upper else f"{median} ({lower} to {upper})"
        sign = "<=" if goal.at_most else ">="
        table.add_row(goal.name, f"{sign} {goal.write(goal.must)}", goal.write(goal.aim), text, line["reached"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that a median is taken over")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_layer.json"))
    arguments = parser.parse_args()
    with Console(stderr=True).status("making the table") as status:
        measured, results = measure_goals(Sizes(), repeats=arguments.repeats, show_progress=status.update)
    report = {
        "machine": describe_machine(),
        "repeats": arguments.repeats,
        "goals": report_of(measured),
        "results": list(map(to_json, results)),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    console.print(table_of(measured))
    for reason in dict.fromkeys(reason for result in results for reason in result.left_out):
        console.print(f"left out: {reason}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
