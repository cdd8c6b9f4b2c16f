"""A model's answer to a question: its likeliest continuation, its probability, and the experts behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tinyexperts.data import Tokenizer
from tinyexperts.errors import InputError
from tinyexperts.evaluation.fired import recorded_firing
from tinyexperts.model import Transformer, evaluation_mode, generate


@dataclass(frozen=True, kw_only=True)
class FiredExpert:
    """An expert that the last token of a question retrieved."""

    layer: str
    head: int
    id: int
    router_weight: float
    activation: float
    """The factor that the expert computes from the token; 1 in a product-key memory."""

    @property
    def factor(self) -> float:
        """The factor of its output vector v in the layer's output: the router weight times the activation."""
        return self.router_weight * self.activation


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer."""

    text: str
    probability: float
    """The probability of the answer after the question, its end included."""
    is_whole: bool
    """False if the answer was cut off at the number of tokens that were allowed."""
    experts: tuple[FiredExpert, ...]
    """The experts with the largest factors, largest first."""


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    question: str,
    *,
    max_new_tokens: int = 32,
    num_fired: int = 8,
) -> Answer:
    """Continue a question by the likeliest token each time, until the model ends the text.

    Args:
        model (Transformer): the model, on any device.
        tokenizer (Tokenizer): its tokenizer.
        question (str): the beginning of a text; white space at its end is left out.
        max_new_tokens (int): tokens of the answer at most.
        num_fired (int): experts to report.

    Raises:
        InputError: an empty question, one that is no UTF-8, that the tokenizer can't hold, or that the context has no
            room for.
    """
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the question must be UTF-8, got {question!r}") from error
    question = question.rstrip()
    ids = tokenizer.encode(question)
    if not ids:
        raise InputError(f"the question must have text, got {question!r}")
    if tokenizer.loses_text([question], [ids])[0]:
        raise InputError(
            f"the tokenizer can't hold the question {question!r}: decoding gives {tokenizer.decode(ids)!r}"
        )
    room = model.config.context_length - len(ids) - 1  # the question follows an end of text
    if room < 1:
        raise InputError(
            f"the question must have at most {model.config.context_length - 2} tokens, which leaves the context of "
            f"{model.config.context_length} room for an answer, got {len(ids)}"
        )
    device = next(model.parameters()).device
    prompt = torch.tensor([[tokenizer.end_of_text_id, *ids]], device=device)
    tokens = generate(
        model,
        prompt,
        max_new_tokens=min(max_new_tokens, room),
        temperature=0,
        end_of_text_id=tokenizer.end_of_text_id,
    )
    start = prompt.shape[1]
    with evaluation_mode(model), torch.no_grad(), recorded_firing(model) as firing:
        log_probabilities = model(tokens[:, :-1])[0, start - 1 :].float().log_softmax(-1)
    fired = [
        FiredExpert(layer=name, head=head, id=id_, router_weight=weight, activation=activation)
        for name, found in firing.items()
        for head in range(found.ids.shape[2])
        for id_, weight, activation in zip(
            *(of_all[0, start - 1, head].tolist() for of_all in (found.ids, found.router_weights, found.activations)),
            strict=True,
        )
    ]
    given = tokens[0, start:]
    text = tokenizer.decode(token for token in given.tolist() if token != tokenizer.end_of_text_id)
    return Answer(
        text=text.strip(),
        probability=math.exp(log_probabilities.gather(1, given[:, None]).sum().item()),
        is_whole=given[-1].item() == tokenizer.end_of_text_id,
        experts=tuple(sorted(fired, key=lambda expert: -abs(expert.factor))[:num_fired]),
    )
