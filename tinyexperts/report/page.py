"""The page of every report: one self-contained HTML file from one template, in which every value is escaped."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2

from tinyexperts.report.style import Drawing
from tinyexperts.report.table import Table

# What HTML forbids even when escaped: lone surrogates, noncharacters, control characters but tab and line feed.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence at the top of a page."""

    text: str
    verdict: str = ""
    """The verdict on the sentence, where it is a claim."""
    evidence: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that a model wrote."""

    label: str
    """The model, as readers know it."""
    color: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with paragraphs, figures and tables below it."""

    title: str
    notes: tuple[str, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True where there is nothing to see below the heading."""
        return not (self.notes or self.drawings or any(table.rows for table in self.tables))


@dataclass(frozen=True, kw_only=True)
class Page:
    """The content of a page, from top to bottom."""

    title: str
    subtitle: str
    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    """A sentence for each thing that is missing or doubtful."""
    sections: tuple[Section, ...]
    command: str
    """The command that makes the page again."""
    made_of: str
    """The data and the versions behind the page."""
    samples: Mapping[str, tuple[Sample, ...]] | None = None
    """Texts of the models by their prompt; None: the page is about no texts."""
    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts to look up by title, such as configurations."""
    created: datetime | None = None
    """The time that the page names; None: now."""

    @property
    def tables(self) -> list[Table]:
        """The tables of all sections."""
        return [table for section in self.sections for table in section.tables]

    def as_html(self) -> str:
        """Return the page as HTML that needs no network."""
        created = (self.created or datetime.now().astimezone()).isoformat(sep=" ", timespec="minutes")
        return _template().render(page=self, created=created)

    def as_markdown(self) -> str:
        """Return the findings, problems and tables as Markdown."""
        findings = [
            f"- {found.text}: **{found.verdict}** ({found.evidence})" for found in self.findings if found.verdict
        ]
        findings += [f"- {found.text}" for found in self.findings if not found.verdict]
        problems = ["What is missing or doubtful:", "", *(f"- {problem}" for problem in self.problems), ""]
        tables = [table.as_markdown() for table in self.tables if table.rows]
        return "\n".join([f"# {self.title}", "", *findings, "", *(problems if self.problems else []), *tables])


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tinyexperts.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    return environment.get_template("page.html.j2")


def _printable(value: Any) -> Any:
    """Replace characters that HTML forbids; a model's sample may hold any byte."""
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value
