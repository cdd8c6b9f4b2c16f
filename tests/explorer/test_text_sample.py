"""The sample of texts: drawn pieces of documents, and the use and places of experts found one text at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyexperts.data import TokenDataset
from tinyexperts.evaluation import recorded_firing
from tinyexperts.explorer.text_sample import draw_texts, passage, use_of_experts


def test_texts_are_whole_documents_until_there_are_tokens_enough(facts) -> None:
    split = facts.split("train")
    texts = draw_texts(split, 64, num_tokens=300, seed=1)
    documents = {(split.end_of_text_id, *split.document(n)[:-1]) for n in range(split.num_documents)}
    assert {tuple(text) for text in texts} <= documents
    assert sum(map(len, texts[:-1])) < 300 <= sum(map(len, texts))
    for same, seed in ((True, 1), (False, 2)):
        others = draw_texts(split, 64, num_tokens=300, seed=seed)
        assert ([tuple(text) for text in others] == [tuple(text) for text in texts]) is same
    assert sum(map(len, draw_texts(split, 64))) == split.num_tokens, "all, where there are fewer than asked for"


def test_of_a_long_document_a_part_is_taken(tiny_data) -> None:
    split = TokenDataset.open(tiny_data).split("train")
    texts = draw_texts(split, 16, num_tokens=500)
    documents = [[split.end_of_text_id, *split.document(n)[:-1].tolist()] for n in range(split.num_documents)]
    assert all(len(text) == 16 for text in texts)
    pieces = {tuple(document[start : start + 16]) for document in documents for start in range(len(document) - 15)}
    assert {tuple(text.tolist()) for text in texts} <= pieces
    assert sum(text[0] == split.end_of_text_id for text in texts) < len(texts) / 2, "not their beginnings alone"


@pytest.mark.parametrize("kind", ["pkm", "gated"])
def test_use_and_places_are_those_of_one_text_at_a_time(facts, models, kind) -> None:
    model = models[kind]
    texts = draw_texts(facts.split("train"), 64, num_tokens=700)
    firings = []
    for text in texts:
        with torch.no_grad(), recorded_firing(model) as firing:
            model(torch.from_numpy(text)[None])
        firings.append(dict(firing))
    wanted = {name: [3, 17, 40, 63] for name in firings[0]}
    found = use_of_experts(model, texts, wanted)
    assert set(found.usage) == set(wanted)
    for name, ids in wanted.items():
        sums = np.zeros(64)
        for firing in firings:
            np.add.at(sums, firing[name].ids.flatten().numpy(), firing[name].router_weights.flatten().numpy())
        np.testing.assert_allclose(found.usage[name].share.numpy(), sums / sums.sum(), rtol=1e-5)
        for id_ in ids:
            strongest = {}
            for number, firing in enumerate(firings):
                _, places, heads, ranks = (firing[name].ids == id_).nonzero(as_tuple=True)
                for place, factor in zip(places, firing[name].factors[0, places, heads, ranks].tolist(), strict=True):
                    if abs(factor) > abs(strongest.get(number, (0, 0.0))[1]):
                        strongest[number] = (int(place), factor)
            best = sorted(strongest.items(), key=lambda each: -abs(each[1][1]))[:8]
            sightings = found.sightings[name, id_]
            assert [abs(each.factor) for each in sightings] == pytest.approx([abs(each[1][1]) for each in best])
            for each in sightings:
                assert strongest[each.text] == (each.place, pytest.approx(each.factor))
    assert sum(map(len, found.sightings.values())) > 10, "some of the experts fire"


def test_a_passage_marks_its_token_and_says_where_it_was_cut(facts) -> None:
    tokenizer = facts.tokenizer
    end = tokenizer.end_of_text_id
    ids = np.array([end, *tokenizer.encode("x" * 100 + "\n y")])
    assert passage(tokenizer, ids, 0).startswith("«end of text»xxxx")
    assert passage(tokenizer, ids, 0).endswith("x ...")
    assert passage(tokenizer, ids, len(ids) - 1).startswith("... x")
    assert passage(tokenizer, np.array([end, *tokenizer.encode("The floor")]), 1).startswith("«The»")
    ids_of_words = np.array([end, *tokenizer.encode("The floor of k7 is 1.")])
    lines = [passage(tokenizer, ids_of_words, place) for place in range(1, len(ids_of_words))]
    assert all(line.replace("«", "").replace("»", "") == "The floor of k7 is 1." for line in lines)
    assert "The «floor» of k7 is 1." in lines
    line = passage(tokenizer, ids, len(ids) - 2)
    assert "\n" not in line
    assert line.count("«") == line.count("»") == 1
