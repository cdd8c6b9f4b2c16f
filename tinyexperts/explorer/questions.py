"""A question to a model: its answer, the truth, and the experts behind it, with what they promote."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tinyexperts.data import Tokenizer
from tinyexperts.data.facts.fact_set import FactSet
from tinyexperts.data.facts.phrasings import Phrasing
from tinyexperts.data.shards.reader import TokenSplit
from tinyexperts.evaluation import Answer, FiredExpert, answer
from tinyexperts.evaluation.facts import answer_losses, fitting_statements
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.model import Transformer

# Statements that are asked at most to find those that are answered best.
_MOST_ASKED = 1000


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The fact that a question asks for."""

    value: str
    rest: str
    """The statement after the question: the value and what closes the sentence."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its answer."""

    text: str
    answer: Answer
    """The answer, with every expert that the question's last token retrieved."""
    truth: Truth | None
    """The truth; None: the data set has no statement that begins like this."""

    @property
    def is_right(self) -> bool:
        """True if the answer is the whole truth and nothing else."""
        return self.truth is not None and self.answer.is_whole and self.answer.text == self.truth.rest

    def strongest(self, layer: str, num_per_head: int) -> list[FiredExpert]:
        """Return the experts of a layer with the largest factors of each head, by head, the largest first."""
        by_head: dict[int, list[FiredExpert]] = {}
        for expert in self.answer.experts:
            if expert.layer == layer:
                by_head.setdefault(expert.head, []).append(expert)
        return [expert for head in sorted(by_head) for expert in by_head[head][:num_per_head]]


def ask(model: Transformer, tokenizer: Tokenizer, text: str, facts: FactSet | None) -> Question:
    """Ask a model a question.

    Args:
        model (Transformer): the model.
        tokenizer (Tokenizer): its tokenizer.
        text (str): the beginning of a text; white space at its end is left out.
        facts (FactSet | None): the facts that may have the truth.

    Raises:
        InputError: a question that the tokenizer or the context can't hold.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, ProductKeyLayer)]
    found = answer(model, tokenizer, text, num_fired=sum(layer.retrieved_per_token for layer in layers))
    text = text.rstrip()
    return Question(text=text, answer=found, truth=None if facts is None else _truth(facts, text))


def best_answered(model: Transformer, split: TokenSplit) -> tuple[list[int], int]:
    """Return the numbers of a split's statements, the best answered first, and how many are answered right.

    Those come first that are answered right, and then the lower losses.

    Args:
        model (Transformer): the model.
        split (TokenSplit): statements of facts. Of the first thousand those are asked that the context holds.
    """
    fitting = fitting_statements(model, split, range(min(_MOST_ASKED, split.num_documents)))
    losses = answer_losses(model, split, fitting)
    order = np.lexsort((losses.nats, ~losses.is_right)).tolist()
    return [fitting[place] for place in order], int(losses.is_right.sum())


def best_questions(model: Transformer, split: TokenSplit) -> list[str]:
    """Return the question of each attribute that a model answers best; arguments are those of `best_answered`."""
    assert split.facts is not None
    facts = split.facts.fact_set
    entities = list(facts.entities)
    questions: dict[str, str] = {}
    for number in best_answered(model, split)[0]:
        entity, attribute, phrasing, _ = split.facts.rows[number].tolist()
        name = facts.attributes[attribute]
        questions.setdefault(name, Phrasing(facts.phrasings[name][phrasing]).question(entities[entity]))
    return [questions[name] for name in facts.attributes if name in questions]


def promoted_tokens(model: Transformer, expert: FiredExpert, num_tokens: int) -> list[int]:
    """Return the tokens whose logits an expert's output would raise most if it went straight to the head.

    This is approximate: blocks that follow are left out, and of the final norm all but its gain.

    Args:
        model (Transformer): the model.
        expert (FiredExpert): the expert; a negative factor turns its v around.
        num_tokens (int): tokens to return, the most promoted first.
    """
    layer = model.get_submodule(expert.layer)
    assert isinstance(layer, ProductKeyLayer)
    with torch.no_grad():
        v = layer.vectors_of(torch.tensor(expert.id), slice(-1, None))[0]
        logits = model.head(expert.factor * v * model.norm.weight)
    tokens: list[int] = logits.topk(num_tokens).indices.tolist()
    return tokens


def _truth(facts: FactSet, text: str) -> Truth | None:
    """Find the fact among the statements that begin with a text up to their value."""
    for attribute, phrasings in facts.phrasings.items():
        for key, values in facts.entities.items():
            if key in text and attribute in values:
                for phrasing in map(Phrasing, phrasings):
                    if phrasing.question(key) == text:
                        rest = phrasing.statement(key, values[attribute]).removeprefix(text).strip()
                        return Truth(value=values[attribute], rest=rest)
    return None
