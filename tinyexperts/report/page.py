"""Pages: self-contained HTML from templates, in which every value is escaped."""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2

from tinyexperts.report.numbers import MISSING, fixed, format_count, percent, scientific, signed

# What HTML forbids even when escaped: lone surrogates, noncharacters, control characters but tab and line feed.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def environment_of(package: str) -> jinja2.Environment:
    """Return the environment of a package's templates: all is escaped, and what HTML forbids is replaced."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters.update(
        fixed=fixed, count=format_count, scientific=scientific, percent=percent, signed=signed, pretty=_pretty
    )
    environment.globals.update(MISSING=MISSING)
    return environment


def _printable(value: Any) -> Any:
    """Replace characters that HTML forbids; a model's sample may hold any byte."""
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
