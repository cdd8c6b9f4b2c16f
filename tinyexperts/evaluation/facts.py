"""Recall of facts: the answers of a model to the questions of a held-out split, and the bits that it stores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tinyexperts.data.facts.fact_set import FactSet
from tinyexperts.data.shards.reader import TokenSplit
from tinyexperts.errors import InputError
from tinyexperts.model import Transformer, evaluation_mode


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The answers of a model to some questions."""

    num_facts: int
    recall: float
    """Share of the questions whose answer, taken greedily, is the whole value and nothing else."""
    nats: float
    """Mean loss of an answer in nats: the sum over the tokens after the question, the end of the text included."""


@dataclass(frozen=True, kw_only=True)
class FactRecall:
    """The recall of the facts of one split."""

    all: Recall
    by_attribute: dict[str, Recall]
    bits_per_parameter: float
    """Bits that the model knows of the table's facts, for each of its parameters.

    For each attribute the entropy of its values in the table less the mean loss, never below zero, times the facts
    there are (the measure of Allen-Zhu and Li, arXiv 2404.05405, section 3).
    """
    num_too_long: int
    """Questions that are left out: with their answers they are longer than the model's context."""


def measure_facts(
    model: Transformer,
    split: TokenSplit,
    *,
    tokens_per_batch: int = 1024,
    max_facts: int | None = None,
    forward_context: AbstractContextManager[object] | None = None,
) -> FactRecall:
    """Ask a model for the facts of a split.

    An answer is right if each of its tokens is the likeliest after the question and the tokens before it, which is
    when greedy generation gives it. Each question begins a text of its own. The model is in evaluation mode meanwhile.

    Args:
        model (Transformer): the model, on any device.
        split (TokenSplit): statements of facts.
        tokens_per_batch (int): tokens of one forward pass, at most, but for a single statement that is longer.
        max_facts (int | None): ask for this many facts, the first of the split, whose order was drawn; None: all.
        forward_context (AbstractContextManager | None): the context of the forward pass, for example autocast.

    Raises:
        InputError: the documents of the split are no statements of facts.
    """
    if (facts := split.facts) is None:
        raise InputError(f"the split {split.name} has no facts to ask for; data prepare --facts makes such data sets")
    numbers = range(split.num_documents if max_facts is None else min(max_facts, split.num_documents))
    documents = {number: np.concatenate([[split.end_of_text_id], split.document(number)]) for number in numbers}
    fitting = [number for number in numbers if len(documents[number]) - 1 <= model.config.context_length]
    nats, is_right = np.zeros(split.num_documents), np.zeros(split.num_documents, dtype=bool)
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():  # FSDP2 trains with what it gathers here
        for batch in _batches(sorted(fitting, key=lambda number: len(documents[number])), documents, tokens_per_batch):
            tokens = torch.full((len(batch), len(documents[batch[-1]])), split.end_of_text_id)
            is_answer = torch.zeros_like(tokens, dtype=torch.bool)
            for row, number in enumerate(batch):
                tokens[row, : len(documents[number])] = torch.from_numpy(documents[number])
                is_answer[row, int(facts.answer_starts[number]) + 1 : len(documents[number])] = True
            inputs, targets, is_answer = (
                tokens[:, :-1].to(device),
                tokens[:, 1:].to(device),
                is_answer[:, 1:].to(device),
            )
            with forward_context or nullcontext():
                logits = model(inputs)[is_answer].float()
            losses = torch.zeros(inputs.shape, dtype=torch.float64, device=device)
            losses[is_answer] = F.cross_entropy(logits, targets[is_answer], reduction="none").double()
            misses = torch.zeros(inputs.shape, dtype=torch.bool, device=device)
            misses[is_answer] = logits.argmax(-1) != targets[is_answer]
            nats[batch] = losses.sum(1).cpu().numpy()
            is_right[batch] = ~misses.any(1).cpu().numpy()
    by_attribute = {}
    for attribute, name in enumerate(facts.fact_set.attributes):
        chosen = [number for number in fitting if facts.attribute_numbers[number] == attribute]
        if chosen:
            by_attribute[name] = _recall(nats[chosen], is_right[chosen])
    bits = sum(
        max(0.0, _entropy(facts.fact_set, name) - recall.nats) / math.log(2) * facts.fact_set.value_counts(name).total()
        for name, recall in by_attribute.items()
    )
    return FactRecall(
        all=_recall(nats[fitting], is_right[fitting]),
        by_attribute=by_attribute,
        bits_per_parameter=bits / model.num_parameters().total,
        num_too_long=len(numbers) - len(fitting),
    )


def _recall(nats: np.ndarray, is_right: np.ndarray) -> Recall:
    num_facts = len(nats) or math.nan
    return Recall(num_facts=len(nats), recall=float(is_right.sum() / num_facts), nats=float(nats.sum() / num_facts))


def _entropy(facts: FactSet, attribute: str) -> float:
    """Return the entropy in nats of an attribute's values among the entities that have one."""
    counts = np.array(list(facts.value_counts(attribute).values()))
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _batches(numbers: list[int], documents: dict[int, np.ndarray], tokens_per_batch: int) -> Iterator[list[int]]:
    """Gather statements, given from short to long, until filled up to the longest they have the tokens of a batch."""
    batch: list[int] = []
    for number in numbers:
        if batch and len(documents[number]) * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
