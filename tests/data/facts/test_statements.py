from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from tinyexperts.data.facts.phrasings import default_phrasings
from tinyexperts.data.facts.statements import Statement, make_statements
from tinyexperts.data.facts.table import FactTable
from tinyexperts.errors import InputError


def table(num_entities: int = 40) -> FactTable:
    entities = {f"e{number}": {"color": f"c{number % 5}", "size": f"s{number}"} for number in range(num_entities)}
    del entities["e3"]["size"]
    return FactTable(description={}, attributes=("color", "size"), entities=entities)


PHRASINGS = {name: default_phrasings(name) for name in ("color", "size")}


def statements(*, fraction: float = 0.1, seed: int = 0) -> list[Statement]:
    return make_statements(table(), PHRASINGS, seed=seed, held_out_fraction=fraction)


def test_what_is_held_out_is_held_out_by_design() -> None:
    by_split: dict[str, list[Statement]] = defaultdict(list)
    for statement in statements():
        by_split[statement.split].append(statement)
    train = {(s.entity, s.attribute, s.phrasing) for s in by_split["train"]}
    trained_facts = {fact[:2] for fact in train}
    validation = [(s.entity, s.attribute, s.phrasing) for s in by_split["validation"]]
    # Known facts in a phrasing that training has of other facts, but not of this one.
    assert {fact[:2] for fact in validation} <= trained_facts
    assert not train & set(validation)
    assert max(Counter(fact[:2] for fact in validation).values()) == 1
    assert {fact[2] for fact in validation} <= {fact[2] for fact in train}
    # The same facts in a phrasing of no training statement.
    unseen_phrasing = [(s.entity, s.attribute, s.phrasing) for s in by_split["unseen-phrasing"]]
    assert {fact[:2] for fact in unseen_phrasing} == {fact[:2] for fact in validation}
    assert {fact[2] for fact in unseen_phrasing} == {5}
    assert 5 not in {fact[2] for fact in train}
    # Entities of no other statement, each of their facts asked for once.
    unseen = {s.entity for s in by_split["unseen-entities"]}
    assert len(unseen) == 4
    assert not unseen & {s.entity for name, group in by_split.items() if name != "unseen-entities" for s in group}
    asked = Counter((s.entity, s.attribute) for s in by_split["unseen-entities"])
    assert set(asked.values()) == {1}
    assert len(asked) == sum(len(table().entities[f"e{entity}"]) for entity in unseen)


def test_every_fact_is_stated_in_every_phrasing_once() -> None:
    made = statements()
    known = [s for s in made if s.split in ("train", "validation")]
    num_facts = len({(s.entity, s.attribute) for s in known})
    assert len(known) == len({s.text for s in known}) == 5 * num_facts
    assert sum(s.split == "validation" for s in known) == -(-5 * num_facts // 10)
    for s in made:
        name = ("color", "size")[s.attribute]
        phrasing = PHRASINGS[name][s.phrasing]
        assert s.text == phrasing.statement(f"e{s.entity}", table().entities[f"e{s.entity}"][name])
        assert s.question == phrasing.question(f"e{s.entity}")


def test_the_order_is_the_seeds() -> None:
    assert statements() == statements()
    assert [s.text for s in statements()] != [s.text for s in statements(seed=1)]
    entities = [s.entity for s in statements()]
    assert entities != sorted(entities)


def test_more_than_one_statement_of_a_fact_is_not_held_out() -> None:
    assert sum(s.split == "validation" for s in statements(fraction=0.2)) == len(
        {(s.entity, s.attribute) for s in statements(fraction=0.2) if s.split in ("train", "validation")}
    )
    with pytest.raises(InputError, match=r"a fraction of 0\.25 takes \d+ of \d+ facts"):
        statements(fraction=0.25)


def test_no_entity_left_to_train_on_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 of 1 entities would be held out at a fraction of 0\.1"):
        make_statements(
            FactTable(description={}, attributes=("color",), entities={"a": {"color": "x"}}),
            PHRASINGS,
            seed=0,
            held_out_fraction=0.1,
        )
