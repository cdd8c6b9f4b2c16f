"""Recall of facts, equal to what generation and the loss of one statement at a time give."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyexperts.data import PrepareConfig, TokenDataset, prepare
from tinyexperts.errors import InputError
from tinyexperts.evaluation import answer, evaluate, measure_facts
from tinyexperts.evaluation.facts import answer_some
from tinyexperts.layers import DenseConfig, ExpertChoiceMoEConfig, PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import Transformer, TransformerConfig, generate

LAYERS = {
    "dense": DenseConfig(),
    "moe": ExpertChoiceMoEConfig(num_experts=4, hidden_dim=16),
    "pkm": ProductKeyMemoryConfig(num_experts=64, num_heads=2, experts_per_head=3, query_dim=6),
    "peer": PEERConfig(num_experts=64, num_heads=2, experts_per_head=3, query_dim=6),
    "gated": PEERConfig(num_experts=64, num_heads=2, experts_per_head=3, query_dim=6, gated=True),
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("facts")
    rows = [f"k{number},{'yes' if number % 4 else 'no'},{number % 3}" for number in range(40)]
    (folder / "t.csv").write_text("\n".join(["name,open,floor", *rows]) + "\n")
    prepare(PrepareConfig(facts=folder / "t.csv", key="name", output=folder / "data", vocab_size=320, seed=1))
    return TokenDataset.open(folder / "data")


def make_model(kind: str = "peer", context_length: int = 64) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=320, context_length=context_length, d_model=16, num_layers=2, num_heads=2, expert_layer=LAYERS[kind]
    )
    return Transformer(config)


@pytest.fixture(scope="module")
def trained(facts: TokenDataset) -> dict[str, Transformer]:
    """Models that know some of the facts: twenty steps on half of the statements, a statement a row."""
    split, models = facts.split("train"), {}
    rows = [torch.from_numpy(np.concatenate([[split.end_of_text_id], split.document(n)])) for n in range(120)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=split.end_of_text_id)
    for kind in LAYERS:
        models[kind] = model = make_model(kind)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
    return models


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("name", ["validation", "unseen-phrasing", "unseen-entities"])
def test_recall_is_that_of_greedy_generation_and_nats_are_the_answers_loss(facts, trained, kind, name) -> None:
    model, split = trained[kind], facts.split(name)
    model.train()
    found = measure_facts(model, split, tokens_per_batch=100)
    assert model.training
    model.eval()
    rights, nats, attributes = [], [], []
    for number, (_, attribute, _, start) in enumerate(split.facts.rows.tolist()):
        ids = torch.from_numpy(np.concatenate([[split.end_of_text_id], split.document(number)]))
        question = ids[None, : start + 1]
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        nats.append(losses[start:].double().sum().item())
        made = generate(model, question, max_new_tokens=len(ids) - start - 1, temperature=0)
        rights.append(made[0].tolist() == ids.tolist())
        attributes.append(split.facts.fact_set.attributes[attribute])
    assert found.all.num_facts == split.num_documents
    assert found.all.recall == pytest.approx(np.mean(rights), abs=1e-12)
    assert found.all.nats == pytest.approx(np.mean(nats), rel=1e-5)
    for attribute, recall in found.by_attribute.items():
        chosen = np.array(attributes) == attribute
        assert recall.num_facts == chosen.sum()
        assert recall.recall == pytest.approx(np.array(rights)[chosen].mean(), abs=1e-12)
        assert recall.nats == pytest.approx(np.array(nats)[chosen].mean(), rel=1e-5)
    if name == "validation":
        assert 0 < found.all.recall < 1, "the model knows some, so that the comparison says something"


@pytest.mark.parametrize("name", ["validation", "unseen-entities"])
def test_answered_questions_are_those_of_the_statements_and_as_right_as_recall_says(facts, trained, name) -> None:
    model, split = trained["peer"], facts.split(name)
    found = answer_some(model, split, num_per_attribute=10**6)
    assert len(found) == split.num_documents
    texts = [facts.tokenizer.decode(split.document(number)[:-1].tolist()) for number in range(split.num_documents)]
    assert sorted(f"{each.question} {each.truth}." for each in found) == sorted(text.strip() for text in texts)
    recalls = measure_facts(model, split).by_attribute
    for attribute, recall in recalls.items():
        of_attribute = [each for each in found if each.attribute == attribute]
        assert np.mean([each.is_right for each in of_attribute]) == pytest.approx(recall.recall)
        assert answer_some(model, split, num_per_attribute=1)[list(recalls).index(attribute)] == of_attribute[0]
    for each in found:
        alone = answer(model, facts.tokenizer, each.question, max_new_tokens=32)
        assert each.is_right == (alone.is_whole and alone.text == f"{each.truth}.")
        assert each.answer == (alone.text.removesuffix(".") if alone.is_whole else f"{alone.text} ...")


def test_an_answer_that_is_cut_off_says_so_and_is_wrong(facts) -> None:
    model, split = make_model("dense"), facts.split("validation")
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.weight[split.end_of_text_id] = 0
    found = answer_some(model, split)
    assert len(found) == 4
    assert all(each.answer.endswith(" ...") for each in found)
    assert not any(each.is_right for each in found)
    short = make_model(context_length=4)
    assert answer_some(short, split) == []


def test_bits_are_the_entropy_that_the_loss_leaves_times_the_facts(facts, trained) -> None:
    model = trained["peer"]
    found = measure_facts(model, facts.split("validation"))
    entropies = {"open": -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), "floor": None}
    counts = np.array([14, 13, 13])
    entropies["floor"] = -float((counts / 40 * np.log(counts / 40)).sum())
    bits = sum(max(0.0, entropies[name] - found.by_attribute[name].nats) / math.log(2) * 40 for name in entropies)
    assert found.bits_per_parameter == pytest.approx(bits / sum(p.numel() for p in model.parameters()), rel=1e-9)


def test_questions_longer_than_the_context_are_left_out_and_counted(facts) -> None:
    split = facts.split("validation")
    lengths = [len(split.document(number)) for number in range(split.num_documents)]
    context_length = int(np.median(lengths))
    found = measure_facts(make_model(context_length=context_length), split)
    assert found.num_too_long == sum(length > context_length for length in lengths) > 0
    assert found.all.num_facts == len(lengths) - found.num_too_long


def test_nothing_that_fits_leaves_nothing_to_say(facts) -> None:
    found = measure_facts(make_model(context_length=4), facts.split("validation"))
    assert found.all.num_facts == 0
    assert math.isnan(found.all.recall)
    assert found.by_attribute == {}
    assert found.bits_per_parameter == 0


def test_some_facts_are_the_first(facts, trained) -> None:
    split = facts.split("validation")
    found = measure_facts(trained["peer"], split, max_facts=5)
    whole = measure_facts(trained["peer"], split, max_facts=10**6)
    assert found.all.num_facts == 5
    assert whole == measure_facts(trained["peer"], split)


def test_documents_that_state_no_facts_are_refused(tiny_data: Path) -> None:
    split = TokenDataset.open(tiny_data).split("validation")
    with pytest.raises(InputError, match="the split validation has no facts to ask for"):
        measure_facts(make_model(), split)


def test_an_evaluation_asks_for_the_facts_of_the_splits_that_it_gets(facts, trained) -> None:
    summary = evaluate(trained["dense"], facts.split("validation"), statements=facts.held_out_splits).summary()
    assert set(summary["facts"]) == {"validation", "unseen-phrasing", "unseen-entities"}
    assert summary["facts"]["validation"]["all"]["num_facts"] == facts.split("validation").num_documents
    assert [each["attribute"] for each in summary["facts"]["validation"]["answers"]] == [
        "open",
        "open",
        "floor",
        "floor",
    ]
    assert "facts" not in evaluate(trained["dense"], facts.split("validation")).summary()


@pytest.mark.parametrize("kind", list(LAYERS))
def test_an_answer_is_the_greedy_continuation_with_its_probability(facts, trained, kind) -> None:
    model, tokenizer = trained[kind], facts.tokenizer
    found = answer(model, tokenizer, "The floor of k7 is ", max_new_tokens=9)
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("The floor of k7 is")]
    made = generate(
        model, torch.tensor([ids]), max_new_tokens=9, temperature=0, end_of_text_id=tokenizer.end_of_text_id
    )[0]
    model.eval()
    with torch.no_grad():
        logs = model(made[None, :-1])[0].log_softmax(-1).gather(1, made[1:, None])[len(ids) - 1 :]
    assert found.probability == pytest.approx(logs.sum().exp().item(), rel=1e-4)
    new = [token for token in made[len(ids) :].tolist() if token != tokenizer.end_of_text_id]
    assert found.text == tokenizer.decode(new).strip()
    assert found.is_whole == (made[-1].item() == tokenizer.end_of_text_id)


@pytest.mark.parametrize("kind", ["pkm", "peer", "gated"])
def test_factors_are_what_the_experts_outputs_are_multiplied_by(facts, trained, kind) -> None:
    model, tokenizer = trained[kind], facts.tokenizer
    found = answer(model, tokenizer, "The floor of k7 is", num_fired=100)
    (name,) = {expert.layer for expert in found.experts}
    layer = model.get_submodule(name)
    seen = []
    handle = layer.register_forward_hook(lambda _layer, inputs, output: seen.append((inputs[0], output)))
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("The floor of k7 is")]
    model.eval()
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    (_, output) = seen[0]
    assert len(found.experts) == 6
    total = sum(expert.factor * layer.experts[expert.id, -1] for expert in found.experts)
    torch.testing.assert_close(total.detach(), output[0, -1], rtol=1e-4, atol=1e-5)
    sizes = [abs(expert.factor) for expert in found.experts]
    assert sizes == sorted(sizes, reverse=True)
    assert answer(model, tokenizer, "The floor of k7 is", num_fired=2).experts == found.experts[:2]


def test_a_dense_model_answers_without_experts(facts, trained) -> None:
    assert answer(trained["dense"], facts.tokenizer, "The floor of k7 is").experts == ()


def test_questions_that_can_not_be_asked_are_refused(facts, trained) -> None:
    model, tokenizer = trained["peer"], facts.tokenizer
    with pytest.raises(InputError, match="the question must have text, got ''"):
        answer(model, tokenizer, "  \n")
    with pytest.raises(InputError, match=r"must have at most 62 tokens.* got \d+"):
        answer(model, tokenizer, "a b c d e f g h " * 10)
    short = Transformer(replace(model.config, context_length=2))
    with pytest.raises(InputError, match="at most 0 tokens"):
        answer(short, tokenizer, "a")
