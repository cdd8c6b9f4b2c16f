"""The loss on a text; of a model with expert-choice layers in both ways of routing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tinyexperts.evaluation.perplexity import Perplexity
from tinyexperts.evaluation.task import Subject, TaskResult
from tinyexperts.layers import ExpertChoiceMoE


@dataclass(frozen=True, kw_only=True)
class PerplexityResult(TaskResult):
    """The loss on a text, of a model with an expert-choice layer in two ways of routing.

    `perplexity` keeps, for each token, the experts whose learned threshold it passes, which leaks least of later
    tokens; `whole_sequences` lets the experts choose among all tokens of a batch of whole sequences, later ones
    included, as the paper presumably did.
    """

    perplexity: Perplexity
    whole_sequences: Perplexity | None
    context_length: int

    def summary(self) -> dict[str, Any]:
        """Return the numbers of both ways of routing."""
        routing = None if self.whole_sequences is None else "threshold (leaks least)"
        result = {**_numbers(self.perplexity), "context_length": self.context_length, "routing": routing}
        if self.whole_sequences is not None:
            routing = "expert choice (sees later tokens)"
            result["whole_sequences"] = _numbers(self.whole_sequences) | {"routing": routing}
        return result


def _numbers(result: Perplexity) -> dict[str, Any]:
    return asdict(result) | {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}


def evaluate_perplexity(subject: Subject) -> PerplexityResult:
    """Measure the loss; of a model with expert-choice layers in both ways of routing."""
    perplexity, _ = subject.one_pass
    layers = [module for module in subject.model.modules() if isinstance(module, ExpertChoiceMoE)]
    whole = None
    if layers:
        with _experts_choose(layers):
            whole = subject.perplexity()
    context_length = subject.model.config.context_length
    return PerplexityResult(perplexity=perplexity, whole_sequences=whole, context_length=context_length)


@contextmanager
def _experts_choose(layers: list[ExpertChoiceMoE]) -> Iterator[None]:
    before = [layer.evaluation_routing for layer in layers]
    try:
        for layer in layers:
            layer.evaluation_routing = "expert_choice"
        yield
    finally:
        for layer, routing in zip(layers, before, strict=True):
            layer.evaluation_routing = routing
