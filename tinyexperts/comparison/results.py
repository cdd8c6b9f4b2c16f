"""The content of a finished or unfinished run folder, read without failing on what isn't there.

A run folder is named `<method>-seed<k>` and holds config.json, run.json, metrics.jsonl, evaluation.json, samples.json
and, for layers with experts, one .npy of expert usage a layer. What is missing or unreadable becomes one sentence in
`problems`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyexperts.comparison.methods import Look, look_of


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerUsage:
    """The router weight of the held-out tokens over the experts of one layer."""

    layer: str
    num_experts: int
    usage: float
    unevenness: float
    """In nats."""
    gini: float
    num_dead: int
    expert_share: np.ndarray | None
    """Float64 [N] that sums to 1; None where its file can't be read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """A run folder's content; a piece that isn't there is None or empty and named in `problems`."""

    folder: Path
    method: str
    seed: int | None
    config: dict[str, Any] | None
    run: dict[str, Any] | None
    train: tuple[dict[str, Any], ...]
    validation: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any] | None
    expert_usage: tuple[LayerUsage, ...]
    samples: tuple[dict[str, str], ...]
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name, by which the report calls the run."""
        return self.folder.name

    @property
    def look(self) -> Look:
        """The method's name and style for readers."""
        return look_of(self.method)

    @property
    def last(self) -> dict[str, Any]:
        """The last line of metrics with the training FLOPs spent by then; empty where there is none."""
        lines = [line for line in (*self.train, *self.validation) if "training_flops" in line]
        return max(lines, key=lambda line: line["training_flops"], default={})

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens a second over the whole run."""
        num_tokens, seconds = self.last.get("num_tokens"), self.last.get("seconds")
        return num_tokens / seconds if num_tokens and seconds else None

    @property
    def router_share(self) -> float | None:
        """The share of the training FLOPs that the routers spend, 0 to 1."""
        flops = (self.run or {}).get("training_flops_per_token") or {}
        return flops["router"] / flops["total"] if flops.get("total") and "router" in flops else None

    def evaluated(self, *keys: str) -> Any:
        """Return a value of evaluation.json by its path of keys; None where it isn't there."""
        return _lookup(self.evaluation, keys)

    def parameters(self, kind: str) -> int | None:
        """Return the number of parameters: `active` for one token or in `total`."""
        count: int | None = _lookup(self.run, ("num_parameters", kind))
        return count


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Read a run folder; nothing that is missing in it is an error."""
    folder = Path(folder)
    problems: list[str] = []
    if not folder.is_dir():
        problems.append(f"{folder.name}: there is no such folder, so the run never started.")
    config = _read_json(folder / "config.json", dict, problems)
    run = _read_json(folder / "run.json", dict, problems)
    lines = _read_metrics(folder / "metrics.jsonl", problems)
    evaluation = _read_json(folder / "evaluation.json", dict, problems)
    # Few runs have samples, and the page says so where none has.
    path = folder / "samples.json"
    samples = (_read_json(path, list, problems) if path.exists() else None) or []
    method, seed = _method_and_seed(folder.name, config)
    return Results(
        folder=folder,
        method=method,
        seed=seed,
        config=config,
        run=run,
        train=tuple(line for line in lines if line.get("split") == "train"),
        validation=tuple(line for line in lines if line.get("split") == "validation"),
        evaluation=evaluation,
        expert_usage=_read_usage(folder, evaluation, problems),
        samples=tuple(sample for sample in samples if {"prompt", "completion"} <= sample.keys()),
        problems=tuple(problems),
    )


def _method_and_seed(name: str, config: dict[str, Any] | None) -> tuple[str, int | None]:
    """Return `peer` and 0 for `peer-seed0`; any other name is a method, with the seed of the configuration."""
    match = re.fullmatch(r"(.+)-seed(\d+)", name)
    if match:
        return match[1], int(match[2])
    return name, (config or {}).get("seed")


def _lookup(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _read_json(path: Path, kind: type, problems: list[str]) -> Any:
    """Return the file's content, or None with a sentence about it; a run that never started says so only once."""
    if not path.parent.is_dir():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(_problem(path, error))
        return None
    if not isinstance(content, kind):
        problems.append(f"{path.parent.name}: {path.name} holds {type(content).__name__}, not {kind.__name__}.")
        return None
    return content


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.parent.is_dir():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        problems.append(_problem(path, error))
        return []
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            problems.append(f"{path.parent.name}: line {number} of {path.name} is broken and was left out.")
    return [line for line in lines if isinstance(line, dict)]


def _read_usage(folder: Path, evaluation: dict[str, Any] | None, problems: list[str]) -> tuple[LayerUsage, ...]:
    layers = []
    for entry in (evaluation or {}).get("expert_usage") or []:
        path = folder / entry["file"]
        expert_share: np.ndarray | None = None
        try:
            expert_share = np.load(path)
        except (OSError, ValueError) as error:
            problems.append(_problem(path, error))
        values = {key: entry[key] for key in ("num_experts", "usage", "unevenness", "gini", "num_dead")}
        layers.append(LayerUsage(layer=str(entry["layer"]), **values, expert_share=expert_share))
    return tuple(layers)


def _problem(path: Path, error: Exception) -> str:
    reason = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error})"
    return f"{path.parent.name}: {path.name} {reason}."
