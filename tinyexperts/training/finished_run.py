"""A run that no training made: weights from elsewhere in the folder of a run that has made all its steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyexperts.data import printable
from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically
from tinyexperts.model import Transformer
from tinyexperts.training import config_file
from tinyexperts.training.checkpoint import save_checkpoint
from tinyexperts.training.config import TrainConfig


def write_finished_run(
    config: TrainConfig, model: Transformer, *, step: int, tokenizer: Path, description: Mapping[str, Any]
) -> None:
    """Write a run that has made all its steps; it appears as a whole or not at all.

    Args:
        config (TrainConfig): how the weights were trained, and the run's folder.
        model (Transformer): the model, whose configuration replaces that of `config`.
        step (int): the number of steps that were made.
        tokenizer (Path): the tokenizer.json.
        description (Mapping[str, Any]): the content of run.json.

    Raises:
        InputError: the folder exists.
    """
    finished = replace(config, model=model.config, num_steps=step, training_flops=None, teaching=None)
    with new_folder(config.run) as folder:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        write_atomically(folder / "run.json", json.dumps(description, indent=2))
        write_atomically(folder / "config.json", config_file.to_json(finished))
        save_checkpoint(folder, step, model, [], {"step": step, "seconds": 0.0, "losses": []}, keep=1)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder under another name, which gets its own when it is whole.

    Args:
        path (Path): the folder.

    Raises:
        InputError: it exists.
    """
    if path.exists():
        raise InputError(f"the folder {printable(path)} exists: choose another")
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
