"""The evaluation of a trained model on one text: all tasks, and evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyexperts.data import EncodedText, TokenSplit
from tinyexperts.evaluation.task import Subject, TaskResult
from tinyexperts.evaluation.tasks import TASKS
from tinyexperts.files import write_atomically
from tinyexperts.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results on one text."""

    results: dict[str, TaskResult]
    """The results by the name of the task."""

    def summary(self) -> dict[str, Any]:
        """Return all numbers, for JSON."""
        return {key: value for result in self.results.values() for key, value in result.summary().items()}

    def save(self, folder: Path) -> None:
        """Write evaluation.json, and the tasks' own files, into the folder of a run."""
        content = {key: value for result in self.results.values() for key, value in result.save(folder).items()}
        write_atomically(folder / "evaluation.json", json.dumps(content, indent=2))


def evaluate(
    model: Transformer,
    text: TokenSplit | EncodedText,
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    statements: Sequence[TokenSplit] = (),
) -> Evaluation:
    """Evaluate a model on a text, in windows of its own context length.

    Args:
        model (Transformer): the model, on any device.
        text (TokenSplit | EncodedText): a split of a data set, or files.
        batch_size (int): windows in one forward pass.
        max_tokens (int | None): whole windows, evenly spread over the text, until they hold this many tokens; None:
            all.
        statements (Sequence[TokenSplit]): splits of a data set of facts, for which the model is asked.

    Returns:
        The result of each task.

    Raises:
        InputError: a number of tokens that is not positive.
    """
    subject = Subject(
        model=model, text=text, batch_size=batch_size, max_tokens=max_tokens, statements=tuple(statements)
    )
    return Evaluation(results={name: task(subject) for name, task in TASKS.items()})
