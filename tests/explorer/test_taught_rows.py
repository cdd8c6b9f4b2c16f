"""What teaching changed in a table, and who retrieves it; on the page of a run that was taught."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch

from tinyexperts.evaluation.fired import recorded_firing
from tinyexperts.explorer import inspect_run
from tinyexperts.explorer.taught_rows import TaughtRows, count_retrievals, taught_rows
from tinyexperts.explorer.text_sample import draw_texts
from tinyexperts.training import TeachConfig, load_model, teach_run, train
from tinyexperts.training.run_folder import read_config


@pytest.fixture
def taught_run(make_config, facts, tmp_path):
    """A run that was taught three facts, with a base of a few steps."""
    model = {"vocab_size": facts.index.vocab_size, "context_length": 48}
    base = make_config("peer", data=facts.folder, num_steps=10, model=model, run=tmp_path / "base")
    train(base, progress=False)
    (tmp_path / "new.csv").write_text("name,open,floor\nn1,yes,2\nn2,no,\n")
    teach_run(
        base.run,
        TeachConfig(
            facts=tmp_path / "new.csv", key="name", output=tmp_path / "taught", remember="nothing", passes=2, threads=1
        ),
        progress=False,
    )
    return tmp_path / "taught"


def test_changes_and_retrievals_are_those_of_the_tables_and_texts(taught_run, facts) -> None:
    model, base = load_model(taught_run), load_model(read_config(taught_run).teaching.base)
    (name, found), *others = taught_rows(taught_run, model).items()
    assert not others
    was, is_now = (dict(each.named_parameters())[f"{name}.experts"].flatten(1).double() for each in (base, model))
    expected = ((is_now - was).norm(dim=1) / was.norm(dim=1)).detach().numpy()
    np.testing.assert_allclose(found.change, expected, rtol=1e-9)
    assert 0 < found.changed.sum() < len(found.change)
    # What is trained is retrieved by the new texts, in windows of several of them.
    assert found.share(found.new, found.changed) > 0.9
    texts = draw_texts(facts.split("train"), 48)
    counts = np.zeros(len(found.old))
    with recorded_firing(model) as firing, torch.no_grad():
        for text in texts:
            model(torch.from_numpy(text)[None])
            np.add.at(counts, firing[name].ids.flatten().numpy(), 1)
    np.testing.assert_array_equal(found.old, counts)
    np.testing.assert_array_equal(count_retrievals(model, texts)[name], counts)


def test_shares() -> None:
    rows = TaughtRows(change=np.array([0, 0.5, 0.1, 0]), new=np.array([0.0, 3, 1, 0]), old=np.array([5.0, 0, 5, 0]))
    assert rows.changed.tolist() == [False, True, True, False]
    assert rows.is_free.tolist() == [False, True, False, True]
    assert rows.share(rows.new, rows.is_free) == 0.75
    assert rows.share(rows.old, rows.changed) == 0.5
    assert rows.share(np.zeros(4), rows.changed) == 0
    assert rows.share(rows.change**2, rows.is_free) == pytest.approx(0.25 / 0.26), "sums below 1 are no counts"


def test_the_page_says_what_teaching_changed_while_the_base_is_there(taught_run) -> None:
    base = read_config(taught_run).teaching.base
    assert taught_rows(base, load_model(base)) is None, "it was not taught"
    page = inspect_run(taught_run, questions=["The floor of n1 is"], threads=1).read_text(encoding="utf-8")
    (found,) = taught_rows(taught_run, load_model(taught_run)).values()
    assert f"Teaching changed {found.changed.sum():,} of the {len(found.change):,} experts" in page
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page[page.index("What teaching changed") :], flags=re.S)
    assert f"{100 * found.share(found.old, found.changed):.1f} %" in [
        cell.replace("\N{NO-BREAK SPACE}", " ").strip() for cell in cells
    ]
    assert "Retrievals by old texts" in page
    shutil.rmtree(base / "checkpoints")
    assert taught_rows(taught_run, load_model(taught_run)) is None
    page = inspect_run(taught_run, questions=["The floor of n1 is"], threads=1).read_text(encoding="utf-8")
    assert "Teaching changed" not in page
