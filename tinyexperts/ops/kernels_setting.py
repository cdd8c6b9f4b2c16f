"""The environment variable TINYEXPERTS_KERNELS, which says what code the operators run."""

from __future__ import annotations

import os

from tinyexperts.errors import InputError

VARIABLE = "TINYEXPERTS_KERNELS"
CHOICES = ("auto", "portable", "triton")


def _read() -> str:
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in CHOICES:
        raise InputError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {setting!r}")
    return setting


SETTING = _read()
"""The setting, read once.

"auto": the kernels of a device where it has some, else plain torch. "portable": plain torch everywhere. "triton": on
CUDA devices Triton's kernels, and an error where they can't run.
"""
