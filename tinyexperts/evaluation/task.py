"""The argument and the result of an evaluation task: a function in tasks/, with a line in TASKS."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyexperts.data import EncodedText, TokenSplit
from tinyexperts.evaluation.expert_usage import recorded_expert_usage
from tinyexperts.evaluation.perplexity import Perplexity, measure_perplexity
from tinyexperts.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and the text that it is measured on in windows of its own context length."""

    model: Transformer
    text: TokenSplit | EncodedText
    batch_size: int = 8
    max_tokens: int | None = None
    statements: tuple[TokenSplit, ...] = ()
    """Splits of statements, for whose facts the model is asked."""

    def perplexity(self) -> Perplexity:
        """Pass the text through the model."""
        return measure_perplexity(
            self.model,
            self.text,
            context_length=self.model.config.context_length,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
        )

    @cached_property
    def one_pass(self) -> tuple[Perplexity, dict[str, Tensor]]:
        """The perplexity of one pass and the sums of router weights by the layer's name; tasks share the pass."""
        with recorded_expert_usage(self.model) as sums:
            return self.perplexity(), sums


class TaskResult(ABC):
    """The result of a task."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return the keys of evaluation.json that are this task's."""

    def sentences(self) -> list[str]:
        """Return the lines that `tinyexperts evaluate` prints below the table of losses."""
        return []

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the files of the result's own into a run folder; return the summary, which names them."""
        return self.summary()
