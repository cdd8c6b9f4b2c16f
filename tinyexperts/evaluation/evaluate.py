"""The evaluation of a trained model on one text: loss, perplexity, bits per byte, expert usage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tinyexperts.data import EncodedText, TokenSplit
from tinyexperts.evaluation.expert_usage import ExpertUsage, expert_usage, recorded_expert_usage
from tinyexperts.evaluation.perplexity import Perplexity, measure_perplexity
from tinyexperts.layers import ExpertChoiceMoE
from tinyexperts.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results on one text.

    A model with an expert-choice layer has two: `perplexity` keeps, for each token, the experts whose learned threshold
    it passes, which leaks least of later tokens; `whole_sequences` lets the experts choose among all tokens of a batch
    of whole sequences, later ones included, as the paper presumably did.
    """

    perplexity: Perplexity
    whole_sequences: Perplexity | None
    expert_usage: dict[str, ExpertUsage]
    """by the layer's name"""
    context_length: int

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        routing = None if self.whole_sequences is None else "threshold (leaks least)"
        result = {**_numbers(self.perplexity), "context_length": self.context_length, "routing": routing}
        if self.whole_sequences is not None:
            result["whole_sequences"] = _numbers(self.whole_sequences) | {
                "routing": "expert choice (sees later tokens)"
            }
        result["expert_usage"] = [
            {
                "layer": name,
                "num_experts": usage.num_experts,
                "usage": usage.usage,
                "unevenness": usage.unevenness,
                "gini": usage.gini,
                "num_dead": usage.num_dead,
            }
            for name, usage in self.expert_usage.items()
        ]
        return result


def evaluate(
    model: Transformer, split: TokenSplit | EncodedText, *, batch_size: int = 8, max_tokens: int | None = None
) -> Evaluation:
    """Evaluate a model on a split, in windows of its own context length."""
    options: dict[str, Any] = {
        "context_length": model.config.context_length,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
    }
    with recorded_expert_usage(model) as sums:
        perplexity = measure_perplexity(model, split, **options)
    whole = None
    if any(isinstance(module, ExpertChoiceMoE) for module in model.modules()):
        with _experts_choose(model):
            whole = measure_perplexity(model, split, **options)
    return Evaluation(
        perplexity=perplexity,
        whole_sequences=whole,
        expert_usage={name: expert_usage(total) for name, total in sums.items()},
        context_length=model.config.context_length,
    )


@contextmanager
def _experts_choose(model: Transformer) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, ExpertChoiceMoE)]
    before = [layer.evaluation_routing for layer in layers]
    try:
        for layer in layers:
            layer.evaluation_routing = "expert_choice"
        yield
    finally:
        for layer, routing in zip(layers, before, strict=True):
            layer.evaluation_routing = routing


def _numbers(result: Perplexity) -> dict[str, Any]:
    return asdict(result) | {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
