"""The model card of an exported run: what its folder knows of it, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tinyexperts.data.shards.index import DatasetIndex, read_index
from tinyexperts.errors import InputError
from tinyexperts.layers import DenseConfig, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig
from tinyexperts.training import TrainConfig, run_folder

_KINDS = {
    PEERConfig: "PEER, a layer of single-neuron experts retrieved by product keys (arXiv 2407.04153)",
    ProductKeyMemoryConfig: "product-key memory (arXiv 1907.05242)",
    ExpertChoiceMoEConfig: "expert-choice mixture of experts (arXiv 2202.09368)",
    DenseConfig: "dense feed-forward layers",
}
_SPLITS = {
    "validation": "facts that it was told, in statements that it was not",
    "unseen-phrasing": "facts that it was told, in a phrasing that it was not told any in",
    "unseen-entities": "facts about entities that it was never told of (the control)",
}


def model_card(run: Path, config: TrainConfig, *, step: int, name: str, license_id: str) -> str:
    """Return the model card of a run, as Markdown behind a head in YAML.

    Args:
        run (Path): the folder of the run.
        config (TrainConfig): its configuration.
        step (int): the number of steps of the weights.
        name (str): the name of the exported folder.
        license_id (str): the license of the weights, as Hugging Face abbreviates it.
    """
    described = run_folder.described(run)
    versions = described.get("versions", {})
    evaluation = run_folder.read_record(run / "evaluation.json")
    index = _index_of(config.data)
    layer = config.model.expert_layer
    head = ModelCardData(
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=name,
        tags=["tinyexperts", layer.kind],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=config.data.name,
                dataset_name=f"{config.data.name} (held-out part)",
                metric_type="perplexity",
                metric_value=round(evaluation["perplexity"], 4),
            )
        ]
        if "perplexity" in evaluation
        else None,
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        f"A small language model, {_beginning(config, described)} with tinyexperts: {_KINDS[type(layer)]}. It "
        "continues text; it was not made to follow instructions, to be right, or to be harmless.",
        "## Use",
        "With tinyexperts and its extra `hf` installed:",
        "```python\nimport tinyexperts.hub  # registers the model with transformers\n"
        "from transformers import pipeline\n\n"
        f'print(pipeline("text-generation", "{name}")("The city of", max_new_tokens=8))\n```',
        "## Model",
        _table(("", ""), _model_rows(config, described)),
        "## Training",
        _table(("", ""), _training_rows(config, described, index, step)),
        "## Results",
        _results(evaluation),
        "Trained with "
        + " and ".join(f"{package} {versions.get(package, 'unknown')}" for package in ("tinyexperts", "torch"))
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _model_rows(config: TrainConfig, described: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    model, layer = config.model, config.model.expert_layer
    counts = described.get("num_parameters", {})
    yield "width", f"{model.d_model}"
    yield "blocks", f"{model.num_layers}"
    yield "attention heads", f"{model.num_heads}, of keys and values {model.key_value_heads}"
    yield "context", f"{model.context_length:,} tokens"
    yield "vocabulary", f"{model.vocab_size:,} tokens"
    yield "blocks with the expert layer", ", ".join(map(str, model.blocks_with_experts))
    yield "expert layer", f"{layer.kind}: " + ", ".join(f"{f.name} {getattr(layer, f.name)}" for f in fields(layer))
    yield "parameters", f"{counts.get('total', 0):,}, of which {counts.get('active', 0):,} take part in a token"


def _training_rows(
    config: TrainConfig, described: Mapping[str, Any], index: DatasetIndex | None, step: int
) -> Iterable[tuple[str, str]]:
    flops = described.get("training_flops_per_token", {})
    tokens = step * config.tokens_per_step
    yield "data set", f"{config.data.name} (sha256 {described.get('data_sha256', 'unknown')[:12]})"
    if index is not None:
        yield "text", ", ".join(f"{key} {value}" for key, value in _without_folders(index.corpus).items())
        yield "tokens of its training part", f"{index.splits['train'].num_tokens:,}"
    yield "steps", f"{step:,} of {config.tokens_per_step:,} tokens"
    yield "tokens seen", f"{tokens:,}"
    if flops:
        yield "training FLOPs", f"{tokens * flops['total']:.3g}, of which {tokens * flops['router']:.3g} choose experts"
    rates = config.optimizer
    if config.teaching is not None:
        yield "training before", "that of another run; its text, tokens and FLOPs are not counted here"
    yield (
        "learning rates",
        f"matrices {rates.matrix_learning_rate:g}, embedding {rates.embedding_learning_rate:g}, head "
        f"{rates.head_learning_rate:g}, tables {rates.table_learning_rate:g}",
    )
    yield "seed", f"{config.seed}"


def _results(evaluation: Mapping[str, Any]) -> str:
    if "loss" not in evaluation:
        return "The model was not evaluated on its held-out text."
    rows = [
        ("loss on held-out text", f"{evaluation['loss']:.4f} nats a token"),
        ("perplexity", f"{evaluation['perplexity']:.3f}"),
    ]
    if evaluation.get("bits_per_byte") is not None:
        rows.append(("bits a byte", f"{evaluation['bits_per_byte']:.4f}"))
    for split, found in (evaluation.get("facts") or {}).items():
        known = found["all"]
        rows.append(
            (
                f"recall of {_SPLITS.get(split, split)}",
                f"{100 * known['recall']:.1f} % of {known['num_facts']:,}, {known['nats']:.2f} nats a fact",
            )
        )
    for usage in evaluation.get("expert_usage") or []:
        rows.append(
            (
                f"experts in use, {usage['layer']}",
                f"{100 * usage['usage']:.1f} % of {usage['num_experts']:,}, unevenness {usage['unevenness']:.2f} nats",
            )
        )
    return _table(("measure", "value"), rows)


def _table(columns: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [columns, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _beginning(config: TrainConfig, described: Mapping[str, Any]) -> str:
    """Return how its weights came about."""
    if config.teaching is not None:
        return f"taught ({config.teaching.train}) what the data set below holds, after another training,"
    return "taught after another training" if "base_sha256" in described else "trained from nothing"


def _without_folders(corpus: Mapping[str, str]) -> dict[str, str]:
    """Return the description of a corpus without the names of files, which tell of the machine that they lie on."""
    if corpus.get("kind") == "files":
        return {"kind": "files"}
    if corpus.get("kind") == "facts":
        return {**corpus, "table": re.split(r"[/\\\\]", corpus["table"])[-1]} if "table" in corpus else dict(corpus)
    return dict(corpus)


def _index_of(data: Path) -> DatasetIndex | None:
    """Return the index of the run's data set where that still lies."""
    try:
        return read_index(data)
    except InputError:
        return None
