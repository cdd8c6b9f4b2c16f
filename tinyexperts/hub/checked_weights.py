"""What is refused of weights that transformers has loaded: it would make up what is missing, in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinyexperts.data import printable
from tinyexperts.errors import InputError
from tinyexperts.training.checkpoint import is_finite


def check_weights(model: nn.Module, told: Mapping[str, Any], *, source: str | Path) -> None:
    """Check that a model was loaded as a whole.

    Args:
        model (nn.Module): the model.
        told (Mapping[str, Any]): the loading info of from_pretrained, with ignore_mismatched_sizes=True.
        source (str | Path): the folder or name that it was loaded from.

    Raises:
        InputError: weights that are missing, unknown, of another shape or not finite, each named.
    """
    problems = [
        *(f"{name} is missing" for name in sorted(told["missing_keys"])),
        *(f"{name} is unknown" for name in sorted(told["unexpected_keys"])),
        *(
            f"{name} has the shape {list(found)}, not {list(meant)}"
            for name, found, meant in sorted(told["mismatched_keys"])
        ),
    ]
    if not problems:
        problems = [f"{name} is not finite" for name, tensor in model.state_dict().items() if not _is_sound(tensor)]
    if problems:
        raise InputError(f"the weights of {printable(source)} don't fit its config.json: {', '.join(problems)}")


def _is_sound(tensor: Tensor) -> bool:
    """Return True for finite weights, and for those that lie on disk until they are used."""
    return tensor.is_meta or is_finite(tensor)
