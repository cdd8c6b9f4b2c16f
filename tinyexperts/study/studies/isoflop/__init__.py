"""The main study: its grid, analysis, tables and figures."""

from tinyexperts.study.studies.isoflop.study import ISOFLOP

__all__ = ["ISOFLOP"]
