"""A table of a report: the same rows as HTML, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

from tinyexperts.report.numbers import MISSING

# A number with its unit or its power of ten; two of them are an interval.
_ONE = r"[-+\N{MINUS SIGN}]?[\d.,]+(?:e[-+]?\d+)?(?: ?(?:[kMGT]?B|[kMGT%])| \N{MULTIPLICATION SIGN} 10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?"
_END = "(?:" + _ONE + "|open)"
_NUMBER = re.compile("(?:" + _END + "(?: to " + _END + ")?|not finite|" + MISSING + ")?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text as a reader sees them."""

    name: str
    """The name of its file."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """How to read the table; each line is a paragraph."""
    colors: tuple[str, ...] = ()
    """The color of the dot before each row; empty: no dots."""
    ends_in_mean: bool = False
    """The last row is the mean of the others."""
    wraps: bool = False
    """The cells are phrases that may be broken into lines."""
    is_folded: bool = False
    """The page shows the table when it is asked for."""

    def is_text(self, column: int) -> bool:
        """Return True if a column holds words, which are set to the left, rather than numbers."""
        return any(not _NUMBER.fullmatch(row[column]) for row in self.rows)

    def as_csv(self) -> str:
        """Return the columns and rows as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def as_markdown(self) -> str:
        """Return the title, the table and its note as Markdown."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(("---",) * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
