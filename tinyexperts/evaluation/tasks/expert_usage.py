"""The usage of experts on a text, of each product-key layer; a run folder keeps each expert's share in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyexperts.evaluation.expert_usage import ExpertUsage, expert_usage
from tinyexperts.evaluation.task import Subject, TaskResult


@dataclass(frozen=True, kw_only=True)
class ExpertUsageResult(TaskResult):
    """The usage of experts by the layer's name."""

    by_layer: dict[str, ExpertUsage]

    def summary(self) -> dict[str, Any]:
        """Return the measures of each layer."""
        return {"expert_usage": [_measures(name, usage) for name, usage in self.by_layer.items()]}

    def sentences(self) -> list[str]:
        """Return a line for each layer."""
        return [
            f"{name}: {usage.usage:.1%} of {usage.num_experts:,} experts used, unevenness {usage.unevenness:.2f} nats, "
            f"Gini {usage.gini:.2f}, {usage.num_dead:,} dead"
            for name, usage in self.by_layer.items()
        ]

    def save(self, folder: Path) -> dict[str, Any]:
        """Write each layer's share of router weight by expert (fp64, [N]) as .npy; return the summary with files."""
        layers = []
        for name, usage in self.by_layer.items():
            file = f"expert-usage-{name}.npy"
            np.save(folder / file, usage.share.numpy(), allow_pickle=False)
            layers.append(_measures(name, usage) | {"file": file})
        return {"expert_usage": layers}


def _measures(layer: str, usage: ExpertUsage) -> dict[str, Any]:
    return {
        "layer": layer,
        "num_experts": usage.num_experts,
        "usage": usage.usage,
        "unevenness": usage.unevenness,
        "gini": usage.gini,
        "num_dead": usage.num_dead,
    }


def evaluate_expert_usage(subject: Subject) -> ExpertUsageResult:
    """Measure the usage of experts in each product-key layer."""
    _, sums = subject.one_pass
    return ExpertUsageResult(by_layer={name: expert_usage(total) for name, total in sums.items()})
