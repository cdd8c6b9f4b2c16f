"""A run that no training made: weights from elsewhere in the folder of a run that has made all its steps."""

from __future__ import annotations

import json
import os
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
    folder: Path,
    config: TrainConfig,
    model: Transformer,
    *,
    step: int,
    tokenizer: Path,
    description: Mapping[str, Any],
) -> None:
    """Write a run that has made all its steps.

    Args:
        folder (Path): where to write it (`new_folder`).
        config (TrainConfig): how the weights were trained, and the run's own folder. That the model was taught stays in
            its description alone.
        model (Transformer): the model, whose configuration replaces that of `config`.
        step (int): the number of steps that were made.
        tokenizer (Path): the tokenizer.json.
        description (Mapping[str, Any]): the content of run.json.
    """
    finished = replace(config, model=model.config, num_steps=step, training_flops=None, teaching=None)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_atomically(folder / "run.json", json.dumps(description, indent=2))
    write_atomically(folder / "config.json", config_file.to_json(finished))
    save_checkpoint(folder, step, model, [], {"step": step, "seconds": 0.0, "losses": []}, keep=1)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder under another name, which gets its own when it is whole; open it before long work.

    Args:
        path (Path): the folder.

    Raises:
        InputError: it exists, or can't be made.
    """
    if path.exists():
        raise InputError(f"the folder {printable(path)} exists: choose another")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"the folder {printable(path)} can't be made: {error.strerror}") from None
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
