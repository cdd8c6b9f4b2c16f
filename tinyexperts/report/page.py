"""The page of every report: one self-contained HTML file from one template, in which every value is escaped."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
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
class Findings:
    """The results of runs, in the order of the page that shows them."""

    title: str = ""
    """The title of the page; empty: the name of the study."""
    findings: Sequence[Finding]
    doubts: Sequence[str] = ()
    """A sentence for each thing that is missing or doubtful."""
    sections: Sequence[Section]
    opening: Sequence[Section] = ()
    """The sections before the findings."""
    samples: Mapping[str, tuple[Sample, ...]] | None = None
    """Texts of the models by their prompt; None: the page is about no texts."""
    repeatable: Sequence[str] = ()
    """The names of the runs whose commands the page gives."""
    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts to look up by title, such as configurations."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page: findings, and how they were made."""

    found: Findings
    subtitle: str
    command: str
    """The command that makes the page again."""
    made_of: str
    """The data and the versions behind the page."""
    created: datetime | None = None
    """The time that the page names; None: now."""

    @property
    def tables(self) -> list[Table]:
        """The tables of all sections."""
        return [table for section in (*self.found.opening, *self.found.sections) for table in section.tables]

    def as_html(self) -> str:
        """Return the page as HTML that needs no network."""
        created = (self.created or datetime.now().astimezone()).isoformat(sep=" ", timespec="minutes")
        return _template().render(page=self, created=created)

    def as_markdown(self) -> str:
        """Return the findings, doubts and tables as Markdown."""
        found = self.found
        lines = [f"- {each.text}: **{each.verdict}** ({each.evidence})" for each in found.findings if each.verdict]
        lines += [f"- {each.text}" for each in found.findings if not each.verdict]
        doubts = ["What is missing or doubtful:", "", *(f"- {doubt}" for doubt in found.doubts), ""]
        tables = [table.as_markdown() for table in self.tables if table.rows]
        return "\n".join([f"# {found.title}", "", *lines, "", *(doubts if found.doubts else []), *tables])


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
