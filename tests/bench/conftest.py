"""What all tests of the benchmark share."""

from __future__ import annotations

import pytest

from tinyexperts.bench import timing


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Make a sample one call: tests look at what comes out, and not at how exact it is."""
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
