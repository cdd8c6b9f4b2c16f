"""The table of plans in docs/scaling.md: one model with 2^20 to 2^28 experts, on 8, 64 and 512 devices of 80 GB.

Nothing is measured: `tinyexperts plan` shows one line of it in full. Run: python benchmarks/plans.py
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.progress import track

from tinyexperts.layers import PEERConfig
from tinyexperts.planning import Devices, MeshPlan, plan
from tinyexperts.training import TrainConfig, recipes

SEQUENCES = 512  # of a step: one million tokens


def config_of(log_num_experts: int, num_devices: int) -> TrainConfig:
    recipe = recipes.peer()
    layer = PEERConfig(num_experts=2**log_num_experts, num_heads=8, query_dim=128)
    model = replace(
        recipe.model,
        d_model=1024,
        num_heads=8,
        num_layers=12,
        context_length=2048,
        vocab_size=32000,
        expert_layer=layer,
    )
    return replace(recipe, model=model, batch_size=num_devices, gradient_accumulation=SEQUENCES // num_devices)


def row(log_num_experts: int, num_devices: int) -> str:
    devices = Devices.parse(f"{num_devices}x80GB")
    plans = plan(config_of(log_num_experts, num_devices), devices)
    fitting = [mesh for mesh in plans if mesh.fits(devices)]
    best = (
        min(fitting, key=lambda mesh: mesh.step_seconds) if fitting else min(plans, key=lambda mesh: mesh.memory.total)
    )
    return " | ".join(["", f"2^{log_num_experts}", str(num_devices), *cells(best, fits=bool(fitting)), ""]).strip()


def cells(mesh: MeshPlan, *, fits: bool) -> list[str]:
    memory, sent, gib = mesh.memory, mesh.exchanges, 2**30
    return [
        f"{mesh.replicate} x {mesh.table}",
        "yes" if fits else "no",
        f"{(memory.weights + memory.gradients + memory.moments) / gib:.1f}",
        f"{memory.total / gib:.1f}",
        f"{sent.dense_part / 1e9:.2f} + {sent.columns / 1e9:.2f} + {sent.replicas / 1e9:.2f}",
        f"{1e3 * mesh.step_seconds:.0f}",
        mesh.bound,
    ]


def main() -> None:
    settings = [(log_num_experts, count) for log_num_experts in range(20, 29, 2) for count in (8, 64, 512)]
    rows = [row(*setting) for setting in track(settings, console=Console(stderr=True), transient=True)]
    print("\n".join(rows))


if __name__ == "__main__":
    main()
