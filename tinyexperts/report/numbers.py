"""Numbers as readers see them."""

from __future__ import annotations

import math

MISSING = "\N{EN DASH}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float | None, digits: int) -> str:
    """Return a number with thousands separated and `digits` decimals, or that it is not finite."""
    if value is None:
        return MISSING
    return f"{value:,.{digits}f}" if math.isfinite(value) else "not finite"


def format_count(value: float | None) -> str:
    """Return a count in short form: 512, 65.5 k, 8.39 M, 1.20 B, 2.5 × 10¹²."""
    if value is None:
        return MISSING
    if value >= 0.9995e12:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g} \N{MULTIPLICATION SIGN} {power_of_ten(int(exponent))}"
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # The next unit begins where rounding to three digits would show 1,000 of this one.
        if value >= 0.9995 * unit:
            return f"{value / unit:.{2 - max(0, math.floor(math.log10(value / unit)))}f} {letter}"
    return f"{value:,.0f}"


def scientific(value: float | None) -> str:
    """Return three digits times a power of ten, as in 3.20 × 10¹²."""
    if value is None:
        return MISSING
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} \N{MULTIPLICATION SIGN} {power_of_ten(int(exponent))}"


def power_of_ten(power: int) -> str:
    """Return 10 with its power, as in 10¹²."""
    return "10" + str(power).translate(_SUPERSCRIPTS)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in percent."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference with its sign, `digits` decimals and a true minus; a dash for None and NaN."""
    return MISSING if value is None or math.isnan(value) else f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
