"""torch.compile for the blocks of a run: it joins the small operations of a step, where it pays for its start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from tinyexperts.errors import InputError
from tinyexperts.model import Transformer

# Training FLOPs from which `auto` compiles on CPUs.
COMPILE_FROM_FLOPS = 5e12


def choose_compilation(
    choice: Literal["auto", "on", "off"], device: torch.device, *, training_flops: float, is_alone: bool
) -> tuple[bool, str]:
    """Choose whether the blocks of a run are compiled.

    Args:
        choice (Literal): on, off, or auto: on CPUs, where the run is long enough and the compiler works.
        device (torch.device): the device of the run.
        training_flops (float): the FLOPs of the whole run.
        is_alone (bool): True for a run of one process.

    Returns:
        True to compile, and the choice in words.

    Raises:
        InputError: "on", but the compiler does not work, or several processes share the run.
    """
    if choice == "on" and not is_alone:
        raise InputError("compile must be auto or off for a run of several processes, got on")
    is_long = device.type == "cpu" and is_alone and training_flops >= COMPILE_FROM_FLOPS
    if choice == "off" or (choice == "auto" and not is_long):
        return False, "blocks not compiled"
    if (failure := _failure_to_compile(device)) is None:
        return True, "blocks compiled"
    if choice == "on":
        raise InputError(f"compile must be auto or off where torch.compile fails, got on ({failure})")
    return False, f"blocks not compiled, since torch.compile fails ({failure})"


def _failure_to_compile(device: torch.device) -> str | None:
    """Compile two small operations; return the reason why it failed, or None."""

    @torch.compile(dynamic=False)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).sin()

    try:
        compiled(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler, a linker or a cache raises
        return str(error).strip().splitlines()[0]
    return None


def compile_blocks(model: Transformer) -> None:
    """Let torch.compile run the blocks of a model, each for one shape of its input, from their next call on."""
    for block in model.blocks:
        block.compile(dynamic=False)


@contextmanager
def without_compilation() -> Iterator[None]:
    """Run compiled blocks as they were, for inputs of other shapes than a step's, while open."""
    with torch.compiler.set_stance("force_eager"):
        yield
