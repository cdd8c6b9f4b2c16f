"""The extras of pyproject.toml: packages that some rooms need, in addition to torch, numpy and numba."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec

_TRAIN = ("tokenizers", "safetensors", "pydantic", "filelock", "tyro", "rich", "tensorboard")
EXTRAS = {
    "train": _TRAIN,
    "study": (*_TRAIN, "matplotlib", "jinja2", "scipy", "pandas", "airportsdata"),
    "hf": (*_TRAIN, "transformers", "accelerate"),
}


class MissingExtra(ImportError):
    """An extra that is not installed; the message is one sentence with the command that installs it."""


def require_extra(extra: str, room: str) -> None:
    """Check that a room's extra is installed, without importing it.

    Args:
        extra (str): name of the extra, a key of EXTRAS.
        room (str): the module that needs it.

    Raises:
        MissingExtra: a package of the extra can't be found.
    """
    missing = [package for package in EXTRAS[extra] if not _is_installed(package)]
    if missing:
        raise MissingExtra(
            f"{room} needs the extra {extra}, of which {', '.join(missing)} can't be found: "
            f"pip install 'tinyexperts[{extra}]'"
        )


def _is_installed(package: str) -> bool:
    with suppress(ImportError, ValueError):  # ValueError: a module that somebody made without a spec
        return find_spec(package) is not None
    return False
