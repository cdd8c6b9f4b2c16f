"""The page of a run's experts: what it says, what it escapes, what is refused."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

from tinyexperts.evaluation import recorded_expert_usage
from tinyexperts.explorer import inspect_run, knock_out
from tinyexperts.explorer.page import EXPERTS_PER_HEAD, Explored, findings_of
from tinyexperts.explorer.questions import ask, best_questions
from tinyexperts.explorer.text_sample import draw_texts, use_of_experts
from tinyexperts.report.page import Page
from tinyexperts.training import config_file, load_model, train


@pytest.fixture
def explored(facts, models):
    """A function that explores a model of a kind with two questions."""

    def explore(kind):
        model, held_out = models[kind], facts.split("validation")
        questions = [
            ask(model, facts.tokenizer, text, held_out.facts.fact_set)
            for text in ("The floor of k7 is", "<b>k7</b>", "The")
        ]
        names = {expert.layer for question in questions for expert in question.answer.experts}
        wanted = {
            name: [expert.id for question in questions for expert in question.strongest(name, EXPERTS_PER_HEAD)]
            for name in names
        }
        texts = draw_texts(facts.split("train"), 64, num_tokens=700)
        return Explored(
            model=model,
            held_out=held_out,
            questions=questions,
            is_chosen=False,
            texts=texts,
            use=use_of_experts(model, texts, wanted),
            knock_out=knock_out(model, held_out, num_facts=3, counts=(1, 2), num_draws=1),
        )

    return explore


@pytest.mark.parametrize("kind", ["pkm", "peer", "gated"])
def test_the_page_has_the_experts_of_each_question_by_layer_and_head(explored, kind) -> None:
    explored = explored(kind)
    found = findings_of(explored)
    first, second, third = (section for section in found.sections if section.title.startswith("Question "))
    assert first.title == "Question 1: The floor of k7 is"
    assert 'Truth: "1". The answer is wrong.' in first.notes[0]
    assert "Truth" not in second.notes[0]
    for question, section in zip(explored.questions, (first, second, third), strict=True):
        assert 'Answer: "' + question.answer.text + '"' in section.notes[0]
        for layer, table in zip(explored.use.usage, section.tables, strict=True):
            experts = question.strongest(layer, EXPERTS_PER_HEAD)
            assert len(table.rows) == len(experts) == 6
            for expert, row in zip(experts, table.rows, strict=True):
                assert row[0] == str(expert.head)
                assert row[1] == f"({expert.id // 8}, {expert.id % 8})"
                minus = f"{expert.factor:+.3f}".replace("-", "\N{MINUS SIGN}")
                assert row[2] == f"{expert.router_weight:.3f}"
                assert row[4] == minus
                assert row[5].count(" \N{MIDDLE DOT} ") >= 4
                assert row[6] == "\N{EN DASH}" or all("«" in line for line in row[6].split("\n"))
    assert any("«" in row[6] for row in first.tables[0].rows)
    passages = [line.split(" ", 1)[1] for row in third.tables[0].rows for line in row[6].split("\n") if "«" in line]
    assert passages, "texts that begin otherwise are shown"
    assert not any(passage.replace("«", "").startswith("The") for passage in passages)
    (table,), (by_fact,) = (section.tables for section in found.sections[-2:])
    rises = explored.knock_out
    assert [row[0] for row in table.rows] == ["1", "2"]
    assert table.rows[1][1] == f"{np.mean(rises.fired.own[1]):+.3f}".replace("-", "\N{MINUS SIGN}")
    assert table.rows[0][4] == f"{np.mean(rises.drawn.others[0]):+.3f}".replace("-", "\N{MINUS SIGN}")
    for place, (number, row) in enumerate(zip(rises.statements, by_fact.rows, strict=True)):
        assert row[0] == explored.held_out.tokenizer.decode(explored.held_out.document(number)[:-1].tolist())
        assert row[1] == f"{rises.losses[place]:.3f}"
        assert row[3] == f"{rises.fired.own[1, place]:+.3f}".replace("-", "\N{MINUS SIGN}")
    assert found.doubts == [
        "The model answers 0 of the 3 facts of the knock-out right; the others are those that it answers best."
    ]
    assert found.findings[0].text == "Of the questions whose truth the data set has, the model answers 0 of 1 right."
    page = Page(found=found, subtitle="", command="", made_of="").as_html()
    assert "<b>k7" not in page
    assert "Question 2: &lt;b&gt;k7&lt;/b&gt;" in page


def test_the_sentence_about_the_knock_out_is_right_whatever_came_out(explored) -> None:
    explored = explored("peer")
    for own, others, words in (
        (2.0, 0.5, "the fact loses more than others do"),
        (0.5, 2.0, "other facts lose more than the fact itself"),
        (0.5, 0.5, "the interval holds zero, so no difference is shown"),
    ):
        explored.knock_out.fired.own[:] = own + np.array([-0.01, 0.0, 0.01])
        explored.knock_out.fired.others[:] = others
        sentence = findings_of(explored).findings[-1].text
        assert words in sentence
        assert f"rises by +{own:.3f} nats" in sentence
        assert f"other facts by +{others:.3f}" in sentence
        assert "3 facts" in sentence


def test_a_run_on_facts_gets_a_page_that_needs_no_network(facts, make_config, run_cli) -> None:
    config = make_config(data=facts.folder, model={"vocab_size": 320, "context_length": 64}, num_steps=2)
    train(config, progress=False)
    code, out, err = run_cli("inspect", config.run)
    assert (code, err) == (0, "")
    assert out == f"{config.run / 'inspect.html'}\n"
    page = (config.run / "inspect.html").read_text()
    model = load_model(config.run)
    for number, question in enumerate(best_questions(model, facts.split("validation"))):
        assert f"Question {number + 1}: {html.escape(question)}" in page
    assert "Facts without their experts" in page
    assert "Of each attribute the best answered held-out question is shown: 0 of 2 are right." in page
    texts = draw_texts(facts.split("train"), 64)
    with recorded_expert_usage(model) as sums:
        use_of_experts(model, texts, {})
    (total,) = sums.values()
    assert f"{100 * float((total > 0).double().mean()):.1f} % of the 64 experts" in page
    assert f"{len(texts)} training texts" in page
    assert f"tinyexperts inspect {config.run}" in page
    assert set(re.findall(r'(?:href|src|xlink:href)="(?!#|data:)([^"]*)"', page)) == set()
    assert "<script" not in page


def test_a_run_on_text_has_the_grid_and_the_questions_that_are_given(make_config, run_cli, tmp_path) -> None:
    config = make_config("pkm", num_steps=2)
    train(config, progress=False)
    path = inspect_run(config.run)
    assert "The grid of use" in path.read_text()
    assert "Question 1" not in path.read_text()
    assert "Facts without" not in path.read_text()
    before = path.read_text()
    for question, sentence in (
        ("", "the question must have text, got ''"),
        ("red " * 60, r"the question must have at most 14 tokens.* got \d+"),
        ("\udcff", "the question must be UTF-8"),
    ):
        code, out, err = run_cli("inspect", config.run, "--question", question)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert re.search(sentence, err)
    assert path.read_text() == before
    code, out, err = run_cli("inspect", config.run, "--question", "the red", "a cat", "--output", tmp_path / "a/b.html")
    assert (code, out, err) == (0, f"{tmp_path / 'a/b.html'}\n", "")
    page = (tmp_path / "a/b.html").read_text()
    assert "Question 1: the red" in page
    assert "Question 2: a cat" in page
    assert "Question 3" not in page
    assert "Truth:" not in page
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("kind", "model", "named"),
    [("dense", {}, "dense"), ("moe", {}, "expert_choice_moe"), ("peer", {"expert_blocks": ()}, "dense")],
)
def test_a_run_without_a_table_is_refused(make_config, run_cli, kind, model, named) -> None:
    config = make_config(kind, model=model)
    config.run.mkdir()
    (config.run / "config.json").write_text(config_file.to_json(config))
    code, out, err = run_cli("inspect", config.run)
    assert (code, out) == (2, "")
    assert err == (
        "tinyexperts: only layers of kind peer and product_key_memory have a table of experts to inspect, and "
        f"{config.run} has layers of kind {named}\n"
    )
    assert [path.name for path in config.run.iterdir()] == ["config.json"]


def test_no_run_is_refused(run_cli, tmp_path) -> None:
    code, out, err = run_cli("inspect", tmp_path)
    assert (code, out) == (2, "")
    assert "is not the folder of a run" in err
