"""Runs on facts side by side: the questions, the recalls and the sentences are those of the run folders."""

# The page's true minus is compared as it is.
# ruff: noqa: RUF001

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tinyexperts.comparison.facts import facts_opening, facts_verdict, measures_table
from tinyexperts.comparison.paired import compare_methods
from tinyexperts.comparison.report import findings_of, write_report
from tinyexperts.comparison.results import Results, read_results

QUESTIONS = {"The city of NRT is": "Tokyo", "<b>FRA</b> is in": "Frankfurt"}


def make_run(
    root: Path, method: str, seed: int, *, recall: float, nats: float, answers: Sequence[str] = ("Tokyo", "")
) -> Results:
    """Return a run that was asked for facts: the recall of cities is 0.1 higher, that of codes 0.1 lower."""
    folder = root / f"{method}-seed{seed}"
    folder.mkdir(parents=True)
    split = {
        "all": {"num_facts": 20, "recall": recall, "nats": nats},
        "by_attribute": {
            "city": {"num_facts": 10, "recall": recall + 0.1, "nats": nats},
            "ICAO code": {"num_facts": 10, "recall": recall - 0.1, "nats": nats},
        },
        "bits_per_parameter": 0.5,
        "answers": [
            {"attribute": "city", "question": question, "truth": truth, "answer": answer, "is_right": answer == truth}
            for (question, truth), answer in zip(QUESTIONS.items(), answers, strict=True)
        ],
    }
    control = {"all": {"num_facts": 5, "recall": 0.0, "nats": 30.0}, "by_attribute": {}, "answers": []}
    facts = {"validation": split, "unseen-phrasing": split, "unseen-entities": control}
    evaluation = {"loss": 1.0 + seed / 10, "facts": facts}
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"seed": seed}), encoding="utf-8")
    spent = {"split": "validation", "loss": 1.0, "training_flops": 1e12, "seconds": 2.0, "num_tokens": 100}
    (folder / "metrics.jsonl").write_text(json.dumps(spent) + "\n", encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"num_parameters": {"total": 250_000, "active": 9}}), encoding="utf-8")
    return read_results(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[Results]:
    """Two seeds of dense and of PEER, which knows more; the second seed answers otherwise."""
    return [
        make_run(tmp_path, "dense", 1, recall=0.34, nats=3.5, answers=("Oslo", "Oslo")),
        make_run(tmp_path, "dense", 0, recall=0.30, nats=3.0, answers=("Tokyo ...", "")),
        make_run(tmp_path, "peer", 0, recall=0.50, nats=2.0, answers=("Tokyo", "Paris")),
        make_run(tmp_path, "peer", 1, recall=0.56, nats=2.6, answers=("Oslo", "Oslo")),
    ]


def test_questions_have_the_truth_and_the_answers_of_the_first_seeds(runs) -> None:
    (table,) = facts_opening(runs)[0].tables
    assert table.columns == ("Asked", "Truth", "dense", "PEER")
    assert table.rows == (
        ("The city of NRT is", "Tokyo", "✗\N{NO-BREAK SPACE}Tokyo ...", "✓\N{NO-BREAK SPACE}Tokyo"),
        ("<b>FRA</b> is in", "Frankfurt", "✗\N{NO-BREAK SPACE}(nothing)", "✗\N{NO-BREAK SPACE}Paris"),
    )
    assert table.note == "Right answers of 2: dense (seed 0) 0, PEER (seed 0) 1."


def test_recall_by_attribute_is_the_mean_of_the_seeds(runs) -> None:
    section = facts_opening(runs)[1]
    (table,) = section.tables
    assert table.columns == ("Method", "Asked", "all facts", "city", "ICAO code")
    assert table.rows[:4] == (
        ("dense", "known facts", "32.0", "42.0", "22.0"),
        ("PEER", "known facts", "53.0", "63.0", "43.0"),
        ("dense", "known facts, in a phrasing never seen", "32.0", "42.0", "22.0"),
        ("PEER", "known facts, in a phrasing never seen", "53.0", "63.0", "43.0"),
    )
    assert table.rows[4] == ("dense", "entities never seen (the control)", "0.0", "–", "–")
    label = re.search(r'aria-label="([^"]*)"', section.drawings[0].svg)[1]
    assert label == (
        "Bar chart: Recall of known facts, %. dense all facts 32.0, city 42.0, ICAO code 22.0; "
        "PEER all facts 53.0, city 63.0, ICAO code 43.0."
    )
    # A number at the end of each bar: both methods' all, city and code.
    drawn = re.findall(r"<text[^>]*>(\d+)</text>", section.drawings[0].svg)
    assert {"32", "42", "22", "53", "63", "43"} <= set(drawn)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    found = stats.t.interval(0.95, len(differences) - 1, loc=np.mean(differences), scale=stats.sem(differences))
    return float(found[0]), float(found[1])


@pytest.mark.parametrize(
    ("recalls", "nats", "knows", "surer"),
    [
        ((0.50, 0.56, 0.52), (2.0, 2.1, 1.9), "PEER knows more", "PEER is surer"),
        ((0.10, 0.16, 0.12), (4.0, 4.1, 3.9), "dense knows more", "dense is surer"),
        ((0.10, 0.60, 0.35), (1.0, 5.0, 3.1), "which of the two leads", "which of the two leads"),
    ],
    ids=["ahead", "behind", "undecided"],
)
def test_the_verdict_follows_the_interval(tmp_path, recalls, nats, knows, surer) -> None:
    theirs = ((0.30, 3.0), (0.34, 3.0), (0.33, 3.0))
    runs = [make_run(tmp_path, "dense", seed, recall=r, nats=n) for seed, (r, n) in enumerate(theirs)]
    ours = zip(recalls, nats, strict=True)
    runs += [make_run(tmp_path, "peer", seed, recall=r, nats=n) for seed, (r, n) in enumerate(ours)]
    (comparison,) = compare_methods(runs, "dense")
    said = facts_verdict(comparison).replace("−", "-")
    points = [100 * (ours - theirs) for ours, (theirs, _) in zip(recalls, theirs, strict=True)]
    low, high = interval(points)
    assert said.startswith(
        f"At equal training FLOPs, not equal time, PEER recalls {100 * np.mean(recalls):.1f} % of the known facts and "
        f"dense 32.3 %, in the mean of 3 seeds: {np.mean(points):+.1f} points (95 % interval {low:+.1f} to "
        f"{high:+.1f}), so {knows}"
    )
    low, high = interval([ours - 3.0 for ours in nats])
    assert f"PEER {np.mean(nats):.2f} nats and dense 3.00: {np.mean(nats) - 3:+.2f} nats (95 % interval " in said
    assert f"{low:+.2f} to {high:+.2f}), so {surer}" in said
    row = measures_table(comparison).rows[2]
    assert [cell.replace("−", "-") for cell in row] == [
        *("recall, known facts, %", "32.3", f"{100 * np.mean(recalls):.1f}", *(f"{each:+.1f}" for each in points)),
        *(f"{np.mean(points):+.1f}", "{:+.1f} to {:+.1f}".format(*interval(points))),
    ]


def test_one_seed_decides_nothing(tmp_path) -> None:
    runs = [make_run(tmp_path, "dense", 0, recall=0.3, nats=3.0), make_run(tmp_path, "peer", 0, recall=0.5, nats=2.0)]
    (comparison,) = compare_methods(runs, "dense")
    said = facts_verdict(comparison)
    assert "with one seed: +20.0 points (one seed has no interval), so which of the two leads can't be said." in said
    assert "knows more" not in said


def test_the_page_opens_with_the_questions_and_is_safe(runs, tmp_path) -> None:
    write_report([run.folder for run in runs], tmp_path / "report.html", command="x")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:3] == ["Asked and answered", "Recall by attribute", "Facts: PEER against dense"]
    assert page.index("The city of NRT is") < page.index('class="verdict"') < page.index("Facts: PEER against dense")
    assert "<b>FRA" not in page
    assert "&lt;b&gt;FRA&lt;/b&gt; is in" in page
    verdict = unescape(re.search(r'<section class="verdict".*?</section>', page, re.DOTALL)[0])
    assert verdict.index("PEER recalls 53.0 %") < verdict.index("in held-out loss")
    assert "Samples" not in headings
    assert "samples.json" not in page
    assert "1.00 MB" in page, "the weights take four bytes a parameter"


def test_runs_without_facts_and_with_them_are_compared_by_loss_alone(runs, tmp_path) -> None:
    folder = tmp_path / "other" / "dense-seed0"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text('{"loss": 1.5}', encoding="utf-8")
    other = read_results(folder)
    assert facts_opening([other]) == []
    found = findings_of([other, runs[2]], "dense")
    assert [finding.text[:25] for finding in found.findings] == ["Can't tell from one seed:"]
    assert [section.title for section in found.opening] == ["Asked and answered", "Recall by attribute"]
    assert not any(section.title.startswith("Facts") for section in found.sections)
