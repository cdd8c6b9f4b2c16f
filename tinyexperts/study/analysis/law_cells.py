"""A fitted law in a row of a table: what was found, between which ends, and what stays open."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinyexperts.report.numbers import MISSING
from tinyexperts.study.analysis.fits.power_law_fit import PowerLawFit, Term

LAW_NOTE = (
    "The 95 % interval of a parameter holds the values with which the law, all else fitted anew, is no worse than "
    "chance explains, if the runs' deviations are independent; open where it goes on beyond what was searched. "
    "Intervals that overlap do not tell two methods apart, and a c whose interval is open below is no loss that any "
    "size would leave."
)


def law_columns(terms: Sequence[Term]) -> tuple[str, ...]:
    """The columns of `law_cells`."""
    parameters = [column for name in _names(terms) for column in _columns(name, terms)]
    return (*parameters, "residuals, nats (root mean square)", "doubt")


def law_cells(fit: PowerLawFit, *, is_finished: bool = True) -> tuple[str, ...]:
    """A law's parameters with their intervals, its residuals, and what speaks against believing it."""
    numbers = {**fit.coefficients, **fit.exponents, "c": fit.constant}
    cells: list[str] = []
    for name in _names(fit.terms):
        is_coefficient = name in fit.coefficients
        cells.append(f"{numbers[name]:.4g}" if is_coefficient else f"{numbers[name]:.3f}")
        if not is_coefficient:
            (low, high), is_open = fit.intervals[name], fit.open_ends[name]
            low_told, high_told = ("open" if o else f"{end:.3f}" for o, end in zip(is_open, (low, high), strict=True))
            cells.append(f"{low_told} to {high_told}")
    doubts = [] if is_finished else ["unfinished"]
    doubts += [f"the runs do not determine {' and '.join(fit.undetermined)}"] if fit.undetermined else []
    return *cells, f"{math.sqrt(float((fit.residuals**2).mean())):.3f}", ", ".join(doubts)


def missing_law_cells(terms: Sequence[Term], reason: str) -> tuple[str, ...]:
    """The row where no law was fitted."""
    return *(MISSING,) * (len(law_columns(terms)) - 1), reason


def _names(terms: Sequence[Term]) -> tuple[str, ...]:
    """c, and each term's coefficient and exponents, as the law is read."""
    return tuple(dict.fromkeys(["c", *(name for t in terms for name in (t.coefficient, *t.exponents.values()))]))


def _columns(name: str, terms: Sequence[Term]) -> tuple[str, ...]:
    return (name,) if name in {term.coefficient for term in terms} else (name, f"{name}, 95 %")
