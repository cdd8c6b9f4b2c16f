"""The page of a run's experts in a real browser: nothing fails, is fetched or sticks out, and its figures are drawn."""

from __future__ import annotations

import pytest
from browser import CHROMIUM, WIDTHS, look_at

from tinyexperts.explorer import inspect_run
from tinyexperts.training import train

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def test_the_page_of_a_run_on_facts(facts, make_config) -> None:
    config = make_config(data=facts.folder, model={"vocab_size": 320, "context_length": 64}, num_steps=2)
    train(config, progress=False)
    texts = ("<script>window.harmed = true</script>", "<img src=x onerror='window.harmed = true'>", "x" * 40)
    looks = look_at(inspect_run(config.run, questions=texts), sync_api)
    assert looks.messages == []
    assert looks.fetched == []
    assert not looks.is_harmed
    assert max(looks.overflow.values()) <= 0
    for width in WIDTHS:
        grid, knocked_out = looks.figures[width]
        for figure in (grid, knocked_out):
            assert figure["width"] >= 300
            assert figure["height"] >= 150
            assert figure["drawn"] >= 3
            assert figure["outside"] == []
