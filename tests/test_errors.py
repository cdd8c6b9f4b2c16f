"""The check of a number."""

from __future__ import annotations

import re

import pytest

from tinyexperts.errors import InputError, require_at_least


@pytest.mark.parametrize(("least", "value"), [(1, 1), (1, 7), (0, 0), (1, None)])
def test_a_number_that_is_large_enough_or_absent_passes(least: int, value: int | None) -> None:
    require_at_least(least, "threads", value)


@pytest.mark.parametrize(("least", "value"), [(1, 0), (2, 1), (0, -1)])
def test_a_smaller_number_is_refused_with_its_name_and_the_rule(least: int, value: int) -> None:
    with pytest.raises(InputError, match=re.escape(f"checkpoint.every must be at least {least}, got {value}") + "$"):
        require_at_least(least, "checkpoint.every", value)
