"""Knock-outs, equal to a copy of the model whose vectors v are zero, asked for one statement at a time."""

from __future__ import annotations

import copy
import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyexperts.errors import InputError
from tinyexperts.evaluation.facts import answer_losses
from tinyexperts.explorer import knock_out, knocked_out
from tinyexperts.layers import DenseConfig, ProductKeyLayer
from tinyexperts.model import Transformer, TransformerConfig
from tinyexperts.ops.activation import activate

MODULE = importlib.import_module("tinyexperts.explorer.knock_out")


def loss_of(model, split, number):
    """The loss of one answer, from logits."""
    ids = torch.from_numpy(np.concatenate([[split.end_of_text_id], split.document(number)]))
    start = int(split.facts.answer_starts[number])
    with torch.no_grad():
        logits = model(ids[None, :-1])[0, start:]
    return F.cross_entropy(logits, ids[start + 1 :], reduction="sum").item()


def copy_without(model, experts):
    """A copy of a model in which the v of some experts are zero."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, id_ in experts:
            copied.get_submodule(name).experts[id_, -1] = 0
    return copied


def fired_for(model, split, number):
    """The sum of the sizes of factors by expert, at the tokens that predict the answer, token by token."""
    ids = torch.from_numpy(np.concatenate([[split.end_of_text_id], split.document(number)]))
    inputs, sizes, handles = {}, {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, ProductKeyLayer):
            keep = lambda _layer, given, _output, name=name: inputs.__setitem__(name, given[0][0])  # noqa: E731
            handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        model(ids[None, :-1])
        for name, x_TD in inputs.items():
            layer = model.get_submodule(name)
            for x in x_TD[int(split.facts.answer_starts[number]) :]:
                routing = layer.route(x[None])
                for id_, weight in zip(routing.ids.flatten().tolist(), routing.weights.flatten().tolist(), strict=True):
                    vectors, factor = layer.experts[id_], weight
                    if len(vectors) > 1:
                        factor *= activate(vectors[0] @ x, layer.activation).item()
                    if len(vectors) > 2:
                        factor *= (vectors[1] @ x).item()
                    sizes[name, id_] = sizes.get((name, id_), 0) + abs(factor)
    for handle in handles:
        handle.remove()
    return sizes


@pytest.fixture
def recorded(monkeypatch):
    """The sets of experts that are knocked out, in turn."""
    sets = []

    def record(model, experts):
        experts = list(experts)
        sets.append(experts)
        return knocked_out(model, experts)

    monkeypatch.setattr(MODULE, "knocked_out", record)
    return sets


@pytest.mark.parametrize("kind", ["pkm", "peer", "gated"])
def test_rises_are_those_of_a_copy_without_the_experts(facts, models, recorded, kind) -> None:
    model, split, counts = models[kind], facts.split("validation"), (1, 3)
    found = knock_out(model, split, num_facts=3, counts=counts, num_draws=2, seed=4)
    assert found.counts == counts
    statements = found.statements
    sizes = {number: fired_for(model, split, number) for number in statements}
    whole = np.array([loss_of(model, split, number) for number in statements])
    np.testing.assert_allclose(found.losses, whole, rtol=1e-4)
    sets = iter(recorded)
    for row, count in enumerate(counts):
        for place, number in enumerate(statements):
            fired, *drawn = (next(sets) for _ in range(3))
            own = sizes[number]
            assert len(fired) == len(set(fired)) == count
            assert min(own[expert] for expert in fired) >= max(own[other] for other in own.keys() - set(fired)) - 1e-6
            rises = []
            for experts in (fired, *drawn):
                without = copy_without(model, experts)
                rises.append(np.array([loss_of(without, split, each) for each in statements]) - whole)
            others = [np.mean([rise[each] for each in range(3) if each != place]) for rise in rises]
            assert found.fired.own[row, place] == pytest.approx(rises[0][place], abs=1e-4)
            assert found.fired.others[row, place] == pytest.approx(others[0], abs=1e-4)
            assert found.drawn.own[row, place] == pytest.approx(np.mean([rise[place] for rise in rises[1:]]), abs=1e-4)
            assert found.drawn.others[row, place] == pytest.approx(np.mean(others[1:]), abs=1e-4)
            fire_for_others = set().union(*(sizes[each] for each in statements if each != number))
            for experts in drawn:
                assert len(set(experts)) == count
                assert set(experts) <= fire_for_others - own.keys()
    assert next(sets, None) is None
    assert np.abs(found.fired.own).min() > 1e-4, "the rises say something"
    assert found.own_minus_others(3).values == pytest.approx(found.fired.own[1] - found.fired.others[1])
    assert found.fired_minus_drawn(1).values == pytest.approx(found.fired.own[0] - found.drawn.own[0])


def test_the_facts_are_drawn_among_those_that_are_answered_right(facts, trained) -> None:
    split = facts.split("validation")
    is_right = answer_losses(trained, split, range(split.num_documents)).is_right
    assert 4 < is_right.sum() < len(is_right)
    found = [knock_out(trained, split, num_facts=4, counts=(1,), num_draws=1, seed=seed) for seed in (0, 0, 1, 2)]
    assert all(is_right[list(each.statements)].all() and each.num_right == 4 for each in found)
    assert found[0].statements == found[1].statements
    np.testing.assert_array_equal(found[0].drawn.own, found[1].drawn.own)
    assert len({each.statements for each in found}) > 1


def test_the_best_answered_facts_are_taken_where_too_few_are_right(facts, models) -> None:
    split = facts.split("validation")
    losses = answer_losses(models["peer"], split, range(split.num_documents))
    assert not losses.is_right.any()
    found = knock_out(models["peer"], split, num_facts=3, counts=(1,), num_draws=1)
    assert set(found.statements) == set(np.argsort(losses.nats)[:3].tolist())
    assert found.num_right == 0


def test_numbers_of_experts_that_some_fact_has_not_are_left_out(facts, models) -> None:
    split = facts.split("validation")
    found = knock_out(models["peer"], split, num_facts=3, counts=(1, 64), num_draws=1)
    assert found.counts == (1,)
    assert found.fired.own.shape == found.drawn.others.shape == (1, 3)


def test_tables_are_bit_for_bit_as_before_also_after_an_error(facts, models) -> None:
    model = models["gated"]
    before = copy.deepcopy(model.state_dict())
    knock_out(model, facts.split("validation"), num_facts=2, counts=(2,), num_draws=1)
    names = [name for name, layer in model.named_modules() if isinstance(layer, ProductKeyLayer)]
    with knocked_out(model, [(name, id_) for name in names for id_ in (5, 7, 5)]):
        assert all((model.get_submodule(name).experts[[5, 7], -1] == 0).all() for name in names)
        assert all((model.get_submodule(name).experts[[5, 7], :-1] != 0).all() for name in names)
    with pytest.raises(ZeroDivisionError), knocked_out(model, [(names[0], 5)]):
        raise ZeroDivisionError
    with pytest.raises(IndexError), knocked_out(model, [(names[0], 3), (names[1], 64)]):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_of_a_quantized_table_are_knocked_out_and_put_back_to_the_bit(models, bits) -> None:
    model = copy.deepcopy(models["gated"])
    model.quantize_(bits)
    before = copy.deepcopy(model.state_dict())
    names = [name for name, layer in model.named_modules() if isinstance(layer, ProductKeyLayer)]
    with knocked_out(model, [(name, id_) for name in names for id_ in (5, 7, 5)]):
        for layer in map(model.get_submodule, names):
            numbers = layer.vectors_of(torch.arange(64))
            assert not numbers[[5, 7], -1].any()
            assert numbers[[5, 7], :-1].any(-1).all()
            assert numbers[[4, 6, 8]].any(-1).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_can_not_be_knocked_out_is_refused(facts, models, make_model, tiny_data) -> None:
    split, model = facts.split("validation"), models["peer"]
    config = TransformerConfig(
        vocab_size=320, context_length=64, d_model=16, num_layers=1, num_heads=2, expert_layer=DenseConfig()
    )
    with pytest.raises(InputError, match="the model has none"):
        knock_out(Transformer(config), split)
    with pytest.raises(InputError, match=r"the context of 4 tokens holds 0"):
        knock_out(make_model("peer", context_length=4), split)
    with pytest.raises(InputError, match="has no facts to ask for"):
        knock_out(model, type(facts).open(tiny_data).split("validation"))
    for options, sentence in (
        ({"num_facts": 1}, "num_facts must be at least 2, got 1"),
        ({"num_draws": 0}, "num_draws must be at least 1, got 0"),
        ({"counts": (1, 0)}, "counts must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=sentence):
            knock_out(model, split, **options)
