"""Numbers as readers see them."""

from __future__ import annotations

import pytest

from tinyexperts.report.numbers import MISSING, format_count


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (512, "512"),
        (999.4, "999"),
        (999_600, "1.00 M"),
        (65_536, "65.5 k"),
        (8.39e6, "8.39 M"),
        (1.2e9, "1.20 B"),
        (999e9, "999 B"),
        (2.5e12, "2.5 \N{MULTIPLICATION SIGN} 10\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}"),
        (9.999e11, "1 \N{MULTIPLICATION SIGN} 10\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}"),
        (None, MISSING),
    ],
)
def test_counts_in_short_form(value, shown):
    assert format_count(value) == shown
