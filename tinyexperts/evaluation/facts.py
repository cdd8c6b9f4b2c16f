"""Recall of facts: the answers of a model to the questions of a held-out split, and the bits that it stores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tinyexperts.data.facts.fact_set import FactSet, SplitFacts
from tinyexperts.data.facts.phrasings import Phrasing
from tinyexperts.data.shards.reader import TokenSplit
from tinyexperts.errors import InputError
from tinyexperts.model import Transformer, evaluation_mode, generate

# An answer is cut off here, or where the truth ends if that is longer.
_ANSWER_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The answers of a model to some questions."""

    num_facts: int
    recall: float
    """Share of the questions whose answer, taken greedily, is the whole value and nothing else."""
    nats: float
    """Mean loss of an answer in nats: the sum over the tokens after the question, the end of the text included."""


@dataclass(frozen=True, kw_only=True)
class AnswerLosses:
    """The losses of the answers of statements, in the order in which these were given."""

    nats: np.ndarray
    """The loss of each answer (fp64), the end of the text included."""
    is_right: np.ndarray
    """True where each token of the answer, and the end, is the likeliest (bool)."""


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


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """A question of a held-out split, with the truth and a model's answer."""

    attribute: str
    question: str
    """The statement up to the value."""
    truth: str
    """The value."""
    answer: str
    """The model's value; one that was cut off ends in three dots."""
    is_right: bool
    """True if the answer is the whole value and nothing else, as recall counts."""


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
    facts = _facts_of(split)
    numbers = range(split.num_documents if max_facts is None else min(max_facts, split.num_documents))
    fitting = fitting_statements(model, split, numbers)
    losses = answer_losses(model, split, fitting, tokens_per_batch=tokens_per_batch, forward_context=forward_context)
    attributes = facts.attribute_numbers[fitting]
    by_attribute = {}
    for attribute, name in enumerate(facts.fact_set.attributes):
        if (chosen := attributes == attribute).any():
            by_attribute[name] = _recall(losses, chosen)
    bits = sum(
        max(0.0, _entropy(facts.fact_set, name) - recall.nats) / math.log(2) * facts.fact_set.value_counts(name).total()
        for name, recall in by_attribute.items()
    )
    return FactRecall(
        all=_recall(losses, np.ones(len(fitting), dtype=bool)),
        by_attribute=by_attribute,
        bits_per_parameter=bits / model.num_parameters().total,
        num_too_long=len(numbers) - len(fitting),
    )


def answer_some(model: Transformer, split: TokenSplit, *, num_per_attribute: int = 2) -> list[AnsweredQuestion]:
    """Ask a model the first questions of each attribute of a split, whose order was drawn.

    Args:
        model (Transformer): the model, on any device.
        split (TokenSplit): statements of facts. Those that are longer than the model's context are not asked.
        num_per_attribute (int): questions of each attribute.

    Raises:
        InputError: the documents of the split are no statements of facts.
    """
    facts = _facts_of(split)
    entities = list(facts.fact_set.entities.items())
    device = next(model.parameters()).device
    answered = []
    for attribute, name in enumerate(facts.fact_set.attributes):
        numbers = np.flatnonzero(facts.attribute_numbers == attribute).tolist()
        fitting = [number for number in numbers if len(split.document(number)) < model.config.context_length]
        for number in fitting[:num_per_attribute]:
            entity, _, phrasing, start = facts.rows[number].tolist()
            key, values = entities[entity]
            sentence = Phrasing(facts.fact_set.phrasings[name][phrasing])
            asked, rest = np.split(np.concatenate([[split.end_of_text_id], split.document(number)]), [start + 1])
            made = generate(
                model,
                torch.from_numpy(asked)[None].to(device),
                max_new_tokens=min(max(len(rest), _ANSWER_TOKENS), model.config.context_length - len(asked)),
                temperature=0,
                end_of_text_id=split.end_of_text_id,
            )[0, len(asked) :].tolist()
            is_whole = made[-1] == split.end_of_text_id
            text = split.tokenizer.decode(made[:-1] if is_whole else made).strip()
            answered.append(
                AnsweredQuestion(
                    attribute=name,
                    question=sentence.question(key),
                    truth=values[name],
                    answer=text.removesuffix(sentence.text.partition("{value}")[2]) if is_whole else f"{text} ...",
                    is_right=made == rest.tolist(),
                )
            )
    return answered


def _facts_of(split: TokenSplit) -> SplitFacts:
    if split.facts is None:
        raise InputError(f"the split {split.name} has no facts to ask for; data prepare --facts makes such data sets")
    return split.facts


def fitting_statements(model: Transformer, split: TokenSplit, numbers: Sequence[int]) -> list[int]:
    """Return the numbers of those statements that the model's context holds."""
    return [number for number in numbers if len(split.document(number)) <= model.config.context_length]


def answer_losses(
    model: Transformer,
    split: TokenSplit,
    numbers: Sequence[int],
    *,
    tokens_per_batch: int = 1024,
    forward_context: AbstractContextManager[object] | None = None,
) -> AnswerLosses:
    """Measure the loss of the answer of each of some statements; the model is in evaluation mode meanwhile.

    Args:
        model (Transformer): the model, on any device.
        split (TokenSplit): statements of facts.
        numbers (Sequence[int]): the statements, of which the context holds each.
        tokens_per_batch (int): tokens of one forward pass, at most, but for a single statement that is longer.
        forward_context (AbstractContextManager | None): the context of the forward pass, for example autocast.

    Raises:
        InputError: the documents of the split are no statements of facts.
    """
    facts = _facts_of(split)
    documents = [np.concatenate([[split.end_of_text_id], split.document(number)]) for number in numbers]
    nats, is_right = np.zeros(len(numbers)), np.zeros(len(numbers), dtype=bool)
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():  # FSDP2 trains with what it gathers here
        for batch in _batches(documents, tokens_per_batch):
            tokens = torch.full((len(batch), len(documents[batch[-1]])), split.end_of_text_id)
            is_answer = torch.zeros_like(tokens, dtype=torch.bool)
            for row, place in enumerate(batch):
                tokens[row, : len(documents[place])] = torch.from_numpy(documents[place])
                is_answer[row, int(facts.answer_starts[numbers[place]]) + 1 : len(documents[place])] = True
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
    return AnswerLosses(nats=nats, is_right=is_right)


def _recall(losses: AnswerLosses, chosen: np.ndarray) -> Recall:
    count = int(chosen.sum())
    num_facts = count or math.nan
    recall, nats = losses.is_right[chosen].sum() / num_facts, losses.nats[chosen].sum() / num_facts
    return Recall(num_facts=count, recall=float(recall), nats=float(nats))


def _entropy(facts: FactSet, attribute: str) -> float:
    """Return the entropy in nats of an attribute's values among the entities that have one."""
    counts = np.array(list(facts.value_counts(attribute).values()))
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _batches(documents: Sequence[np.ndarray], tokens_per_batch: int) -> Iterator[list[int]]:
    """Gather the places of documents, from short to long, until filled up they have the tokens of a batch."""
    batch: list[int] = []
    for place in sorted(range(len(documents)), key=lambda place: len(documents[place])):
        if batch and len(documents[place]) * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
