"""A table of a report: the same rows as HTML, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

from tinyexperts.report.numbers import MISSING

# With its unit; two of them are an interval.
_ONE = r"[-+\N{MINUS SIGN}]?[\d.,]+(?:e[-+]?\d+)?(?: ?[kMGTB%])?"
_END = "(?:" + _ONE + "|open)"
_NUMBER = re.compile("(?:" + _END + "(?: to " + _END + ")?|" + MISSING + ")?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells are what a reader sees; `note` says how to read them; a folded one is opened by who looks something up."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    is_folded: bool = False

    def is_text(self, column: int) -> bool:
        """Whether a column holds words rather than numbers, and is set to the left."""
        return any(not _NUMBER.fullmatch(row[column]) for row in self.rows)

    def as_csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def as_markdown(self) -> str:
        lines = [f"### {self.title}", "", _line(self.columns), _line(("---",) * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
