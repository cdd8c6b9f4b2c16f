"""Loss on facts after equal training FLOPs: our transformer, with each layer in turn in its expert block.

Data, order of batches, attention, the other blocks and their rates are the recipes' for all. Each layer is trained at
the best of three rates, a factor of four apart, chosen on a seed that is not judged; while the best is at an end of
what was tried, the next one is tried too, up to five. Theirs by AdamW: PEER-pytorch names no optimizer, so all of its
layer has one rate; product-key-memory's own helper gives its values ten times the rate of the rest.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from peer_package_parts.layers import (
    Foreign,
    Sizes,
    imported,
    peer_pytorch,
    peer_pytorch_started_as_ours,
    product_key_memory,
)
from tinyexperts.data import PrepareConfig, prepare
from tinyexperts.data.facts.table import AIRPORTS
from tinyexperts.errors import InputError
from tinyexperts.evaluation import measure_facts, measure_perplexity
from tinyexperts.files import write_atomically
from tinyexperts.optim import build_optimizers, scale_learning_rates, warmup_stable_decay
from tinyexperts.training import recipes
from tinyexperts.training.config import TrainConfig, with_settings
from tinyexperts.training.run import Run, make_run
from tinyexperts.training.step import Diverged, optimizer_step

# What product-key-memory's fetch_optimizer_parameters gives its values, over the 1e-3 of its README for the rest.
_VALUES_OVER_REST = 10
# Rates that are tried lie so far apart; at most so many.
_FACTOR, _MAX_RATES = 4, 5


@dataclass(frozen=True, kw_only=True)
class FactsConfig:
    """The runs and their sizes; each takes as many steps as its training FLOPs pay for."""

    training_flops: float = 6e11
    num_airports: int = 300
    vocab_size: int = 1024
    context_length: int = 128
    batch_size: int = 8
    width: int = 32
    num_experts: int = 2**14
    num_heads: int = 4
    query_dim: int = 32
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)

    def sizes(self, experts_per_head: int) -> Sizes:
        """Return the sizes of an expert layer."""
        return Sizes(
            d_model=self.width,
            num_experts=self.num_experts,
            num_heads=self.num_heads,
            experts_per_head=experts_per_head,
            query_dim=self.query_dim,
        )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A layer, and how it is trained."""

    label: str
    experts_per_head: int | None
    """K; None for a dense layer."""
    rate: float
    """The rate in the middle of those that are tried: the recipe's, or the README's."""
    rate_of: str
    """What has this rate, for readers."""
    recipe: str = "dense"
    """The recipe of the model, whose layer is replaced by theirs."""
    make: Callable[[Sizes], nn.Module] | None = None
    """Makes their layer; None for ours."""


METHODS = {
    "dense": Method(label="dense", experts_per_head=None, rate=4e-3, rate_of="the layer"),
    "peer": Method(label="tinyexperts PEER", experts_per_head=16, rate=1e-2, rate_of="the table", recipe="peer"),
    "product-key-memory": Method(
        label="tinyexperts product-key memory",
        experts_per_head=32,
        rate=1e-2,
        rate_of="the table",
        recipe="product-key-memory",
    ),
    "peer-pytorch": Method(
        label="PEER-pytorch, softmax of K",
        experts_per_head=16,
        rate=4e-3,
        rate_of="the layer",
        make=partial(peer_pytorch, non_competing_scores=False),
    ),
    "peer-pytorch-our-start": Method(
        label="the same, initial weights as ours",
        experts_per_head=16,
        rate=4e-3,
        rate_of="the layer",
        make=peer_pytorch_started_as_ours,
    ),
    "peer-pytorch-default": Method(
        label="PEER-pytorch, default (1 a head)",
        experts_per_head=16,
        rate=4e-3,
        rate_of="the layer",
        make=peer_pytorch,
    ),
    "their-product-key-memory": Method(
        label="product-key-memory",
        experts_per_head=32,
        rate=1e-3,
        rate_of="the layer, its values ten times as much",
        make=product_key_memory,
    ),
}


def prepare_facts(config: FactsConfig, folder: Path) -> None:
    """Prepare the data set, unless the folder has it."""
    if not folder.exists():
        prepare(
            PrepareConfig(
                output=folder, corpus=AIRPORTS, max_entities=config.num_airports, vocab_size=config.vocab_size
            )
        )


def make_model_run(config: FactsConfig, data: Path, name: str, rate: float, seed: int) -> Run:
    """Make a run before its first step, with a layer in the expert block at a rate of its own."""
    method = METHODS[name]
    settings: dict[str, Any] = {
        "data": data,
        "run": data / "no-run",
        "model.vocab_size": config.vocab_size,
        "model.context_length": config.context_length,
        "model.d_model": config.width,
        "model.num_heads": config.width // 16,
        "batch_size": config.batch_size,
        "training_flops": config.training_flops,
        "threads": 1,
        "compile": "off",
        "device": "cpu",
        "seed": seed,
    }
    if method.recipe != "dense":
        settings |= {
            "model.expert_layer.num_experts": config.num_experts,
            "model.expert_layer.num_heads": config.num_heads,
            "model.expert_layer.experts_per_head": method.experts_per_head,
            "model.expert_layer.query_dim": config.query_dim,
            "optimizer.table_learning_rate": rate,
        }
    train_config = with_settings(recipes.RECIPES[method.recipe](), settings)
    run = make_run(train_config)
    if method.recipe != "dense":
        return run
    block = run.model.blocks[run.model.config.blocks_with_experts[0]]
    if method.make is not None:
        assert method.experts_per_head is not None
        torch.manual_seed(seed)
        theirs = method.make(config.sizes(method.experts_per_head))
        block.feed_forward = Foreign(theirs, imported(theirs))
    flops_per_step = round(3 * run.model.flops_per_token(config.context_length) * train_config.tokens_per_step)
    return replace(
        run,
        optimizers=_optimizers(train_config, run.model, block.feed_forward, rate),
        flops_per_step=flops_per_step,
        num_steps=int(config.training_flops // flops_per_step),
    )


def _optimizers(config: TrainConfig, model: nn.Module, layer: nn.Module, rate: float) -> list[Optimizer]:
    """Build the recipe's optimizer for all but the layer, and AdamW for the layer."""
    rates, parameters = config.optimizer, list(layer.parameters())
    layer.requires_grad_(False)  # what isn't trained is left out
    optimizers = build_optimizers(
        model,
        sparse_tables=False,
        matrix_lr=rates.matrix_learning_rate,
        embedding_lr=rates.embedding_learning_rate,
        head_lr=rates.head_learning_rate,
        vector_lr=rates.matrix_learning_rate,
        betas=rates.betas,
    )
    layer.requires_grad_(True)
    values = [module.weight for module in layer.modules() if isinstance(module, nn.EmbeddingBag)]
    of_values = {id(parameter) for parameter in values}
    groups = [
        {"params": [each for each in parameters if id(each) not in of_values], "peak_lr": rate},
        {"params": values, "peak_lr": _VALUES_OVER_REST * rate},
    ]
    trained = [group | {"name": "layer", "lr": group["peak_lr"]} for group in groups if group["params"]]
    return [*optimizers, AdamW(trained, betas=rates.table_betas, weight_decay=0.0, fused=True)]


def train_run(config: FactsConfig, data: Path, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Train and measure one run; a run that diverges has no loss."""
    run = make_model_run(config, data, name, rate, seed)
    warmup = round(run.config.schedule.warmup_fraction * run.num_steps)
    started = time.process_time()
    found: dict[str, Any] = {"nats_per_fact": None, "recall": None, "loss": None}
    try:
        for step in range(run.num_steps):
            scale_learning_rates(
                run.optimizers,
                warmup_stable_decay(
                    step, num_steps=run.num_steps, warmup_steps=warmup, decay_steps=run.num_steps - warmup
                ),
            )
            optimizer_step(run, step)
    except Diverged as error:
        print(f"{name}, rate {rate:g}, seed {seed}: {error}")
    else:
        split = run.dataset.split("validation")
        facts = measure_facts(run.model, split)
        text = measure_perplexity(run.model, split, context_length=config.context_length)
        found = {"nats_per_fact": facts.all.nats, "recall": facts.all.recall, "loss": text.loss}
    count = run.model.num_parameters()
    return found | {
        "method": name,
        "rate": rate,
        "seed": seed,
        "num_steps": run.num_steps,
        "flops_per_step": run.flops_per_step,
        "training_flops": run.num_steps * run.flops_per_step,
        "active_parameters": count.active,
        "total_parameters": count.total,
        "cpu_seconds": time.process_time() - started,
    }


def measure(config: FactsConfig, output: Path, show: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Train all runs that a folder lacks, and return all.

    Args:
        config (FactsConfig): the sizes.
        output (Path): the folder.
        show (Callable): called with what is done next.

    Returns:
        By the method's name its runs at the seeds that are judged, "runs", and those that chose their rate, "tuning".

    Raises:
        InputError: the folder holds runs of other sizes.
    """
    _claim(config, output / "facts-config.json")
    data = output / "facts-data"
    prepare_facts(config, data)

    def run(name: str, rate: float, seed: int) -> dict[str, Any]:
        path = output / "facts-runs" / f"{name}-rate{rate:g}-seed{seed}.json"
        if not path.exists():
            show(f"facts: {METHODS[name].label}, rate {rate:g}, seed {seed}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(train_run(config, data, name, rate, seed), indent=1) + "\n")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    tuned = {name: _tuned(method.rate, partial(run, name, seed=config.tuning_seed)) for name, method in METHODS.items()}
    return {
        name: {"tuning": tuning, "runs": [run(name, _best(tuning)["rate"], seed) for seed in config.seeds]}
        for name, tuning in tuned.items()
    }


def _claim(config: FactsConfig, path: Path) -> None:
    """Note the sizes of a folder's runs, or refuse others."""
    text = json.dumps(asdict(config), indent=1) + "\n"
    if not path.exists():
        write_atomically(path, text)
    elif path.read_text() != text:
        raise InputError(f"{path.parent} has runs on facts of other sizes ({path.name}): give another --output")


def _tuned(middle: float, run: Callable[[float], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return runs at rates around a middle one, from low to high, until the best is at no end."""
    runs = [run(rate) for rate in (middle / _FACTOR, middle, middle * _FACTOR)]
    while len(runs) < _MAX_RATES and (best := _best(runs)) in (runs[0], runs[-1]):
        if best is runs[0]:
            runs.insert(0, run(runs[0]["rate"] / _FACTOR))
        else:
            runs.append(run(runs[-1]["rate"] * _FACTOR))
    return runs


def _best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return min(runs, key=lambda each: math.inf if each["nats_per_fact"] is None else each["nats_per_fact"])
