"""Questions: right where recall says so, the truth from the table, and what v promotes through the head by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from tinyexperts.evaluation.facts import answer_losses
from tinyexperts.explorer.questions import ask, best_questions, promoted_tokens


def question_and_value(split, number):
    entity, attribute, phrasing, _ = split.facts.rows[number].tolist()
    facts = split.facts.fact_set
    key, values = list(facts.entities.items())[entity]
    name = facts.attributes[attribute]
    return facts.phrasings[name][phrasing].partition(" {value}")[0].replace("{key}", key), values[name]


def test_an_answer_is_right_where_recall_counts_it(facts, trained) -> None:
    split = facts.split("validation")
    numbers = range(split.num_documents)
    is_right = answer_losses(trained, split, numbers).is_right
    assert 0 < is_right.sum() < len(is_right)
    for number in numbers:
        text, value = question_and_value(split, number)
        question = ask(trained, facts.tokenizer, text + "  ", split.facts.fact_set)
        assert question.text == text
        assert question.truth.value == value
        assert question.is_right == is_right[number]


def test_what_no_statement_begins_with_has_no_truth(facts, trained) -> None:
    fact_set = facts.split("validation").facts.fact_set
    for text in ("The floor of k7", "The floor of k99 is", "k7"):
        question = ask(trained, facts.tokenizer, text, fact_set)
        assert question.truth is None
        assert not question.is_right
    assert ask(trained, facts.tokenizer, "The floor of k7 is", None).truth is None


def test_the_best_answered_question_of_each_attribute_is_chosen(facts, trained) -> None:
    split = facts.split("validation")
    losses = answer_losses(trained, split, range(split.num_documents))
    expected = []
    for attribute in range(2):
        own = [number for number in range(split.num_documents) if split.facts.attribute_numbers[number] == attribute]
        best = min(own, key=lambda number: (not losses.is_right[number], losses.nats[number]))
        expected.append(question_and_value(split, best)[0])
    assert best_questions(trained, split) == expected


def test_the_strongest_experts_are_those_of_each_head(facts, models) -> None:
    question = ask(models["gated"], facts.tokenizer, "The floor of k7 is", None)
    assert len(question.answer.experts) == 12  # two layers, two heads, three experts
    for layer in ("blocks.0.feed_forward", "blocks.1.feed_forward"):
        chosen = question.strongest(layer, 2)
        assert [expert.head for expert in chosen] == [0, 0, 1, 1]
        for head in (0, 1):
            sizes = {e.id: abs(e.factor) for e in question.answer.experts if (e.layer, e.head) == (layer, head)}
            assert [e.id for e in chosen if e.head == head] == sorted(sizes, key=sizes.get, reverse=True)[:2]


@pytest.mark.parametrize("kind", ["pkm", "peer", "gated"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_promoted_tokens_are_those_of_v_through_gain_and_head(facts, models, kind, bits) -> None:
    model = copy.deepcopy(models[kind])
    if bits is not None:
        model.quantize_(bits)
    experts = ask(model, facts.tokenizer, "The floor of k7 is", None).answer.experts
    for expert in experts:
        v = model.get_submodule(expert.layer).vectors_of(torch.tensor(expert.id))[-1]
        logits = [float((row * model.norm.weight * v).sum().detach()) * expert.factor for row in model.head.weight]
        expected = sorted(range(len(logits)), key=lambda token: -logits[token])[:5]
        assert promoted_tokens(model, expert, 5) == expected
    if kind != "pkm":
        assert any(expert.factor < 0 for expert in experts), "a negative factor turns v around"
    assert torch.is_grad_enabled()
