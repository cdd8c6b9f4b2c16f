"""A study: a question, the grid of runs that answers it, and the findings that its runs allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinyexperts.report.page import Findings
from tinyexperts.study.analysis.frame import StudyRuns
from tinyexperts.study.grid import Stage


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study, from its question to its findings."""

    name: str
    summary: str
    """The help of its command."""
    question: str
    stages: Callable[[Any], Sequence[Stage]]
    """The stages of runs at a scale (scales.py)."""
    is_about_facts: bool = False
    """True if the study needs a data set of facts; the others take one too."""
    compares_data: bool = False
    """True if the study can be run on several data sets of facts, to compare them."""
    teaches: bool = False
    """True if the study teaches new facts, round by round."""
    findings: Callable[[StudyRuns], Findings]
    """The findings from its runs, of which some may still be to come."""
