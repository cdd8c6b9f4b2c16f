"""The recall of facts of each held-out split of a data set of facts, and a few questions with their answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tinyexperts.evaluation.facts import AnsweredQuestion, FactRecall, answer_some, measure_facts
from tinyexperts.evaluation.task import Subject, TaskResult


@dataclass(frozen=True, kw_only=True)
class FactsResult(TaskResult):
    """The recall of facts, and some answers, by the name of the split."""

    by_split: dict[str, FactRecall]
    answers: dict[str, list[AnsweredQuestion]]

    def summary(self) -> dict[str, Any]:
        """Return the recall and the answers of each split; nothing without facts."""
        splits = {
            name: asdict(found) | {"answers": [asdict(each) for each in self.answers[name]]}
            for name, found in self.by_split.items()
        }
        return {"facts": splits} if splits else {}

    def sentences(self) -> list[str]:
        """Return a line for each split."""
        return [
            f"{name}: {found.all.recall:.1%} of {found.all.num_facts:,} facts recalled ("
            + ", ".join(f"{attribute} {recall.recall:.1%}" for attribute, recall in found.by_attribute.items())
            + f"), {found.all.nats:.2f} nats a fact, {found.bits_per_parameter:.3g} bits a parameter"
            + (f"; {found.num_too_long:,} longer than the context are left out" if found.num_too_long else "")
            for name, found in self.by_split.items()
        ]


def evaluate_facts(subject: Subject) -> FactsResult:
    """Ask for the facts of the subject's splits of statements."""
    return FactsResult(
        by_split={split.name: measure_facts(subject.model, split) for split in subject.statements},
        answers={split.name: answer_some(subject.model, split) for split in subject.statements},
    )
