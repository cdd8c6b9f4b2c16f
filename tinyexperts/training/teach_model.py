"""Teach a model in memory new statements: the same trainer, on a run in a folder that goes again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from tinyexperts.data import PrepareConfig, Tokenizer, prepare
from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically
from tinyexperts.model import Transformer
from tinyexperts.training.checkpoint import load_model, save_checkpoint
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.config_file import to_json
from tinyexperts.training.loop import Interrupted
from tinyexperts.training.teach_config import TeachConfig, TeachOptions
from tinyexperts.training.teaching import Taught, teach_run


def teach(
    model: Transformer,
    statements: Sequence[str],
    tokenizer: Tokenizer,
    *,
    old_statements: Sequence[str] = (),
    options: TeachOptions | None = None,
    progress: bool = True,
) -> Taught:
    """Teach a model new statements, in place; it stays as it was if that fails or is interrupted.

    A twentieth of the statements, one at least, is held out: teaching ends when these are predicted no better. State
    each fact in several phrasings, so that one that is held out was trained in others.

    Args:
        model (Transformer): the model, on any device.
        statements (Sequence[str]): the new texts, two different ones at least.
        tokenizer (Tokenizer): the model's tokenizer.
        old_statements (Sequence[str]): texts that the model knows: it is asked for them before and after, and goes over
            them again with `options.remember` "data".
        options (TeachOptions | None): the way to teach; None: the tables alone, remembering by own samples.
        progress (bool): show progress bars.

    Returns:
        What the model knew before and knows after: `new`, and `old` or `own-samples`.

    Raises:
        InputError: too few statements, another tokenizer than the model's, a model without a table of which the tables
            are to be trained, data that were not given, own samples that are of no use.
        Interrupted: after Ctrl-C and the like.
    """
    options = options or TeachOptions()
    if options.rows is not None and options.remember == "nothing" and not old_statements:
        raise InputError(f"old_statements must be given for rows where nothing is remembered, got rows {options.rows}")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the tokenizer must be the model's, of {model.config.vocab_size:,} tokens, got one of "
            f"{tokenizer.vocab_size:,}"
        )
    if options.remember == "data" and not old_statements:
        raise InputError("old_statements must be given to remember data, got none")
    with TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "model"
        base.mkdir()
        tokenizer.save(base / "tokenizer.json")
        old_data = folder / "old"
        if old_statements:
            files = (_written(folder / "old.jsonl", old_statements),)
            prepare(PrepareConfig(files=files, tokenizer=str(base / "tokenizer.json"), output=old_data))
        config = TrainConfig(run=base, data=old_data, model=model.config, num_steps=1)
        write_atomically(base / "config.json", to_json(config))
        save_checkpoint(base, 0, model, [], {}, keep=1)
        new = TeachConfig(
            files=(_written(folder / "new.jsonl", statements),), output=folder / "taught", **asdict(options)
        )
        try:
            taught = teach_run(base, new, progress=progress)
        except Interrupted as interrupted:
            raise Interrupted("stopped; the model is as it was", signal=interrupted.signal) from None
        model.load_state_dict(load_model(new.output).state_dict())
    return taught


def _written(path: Path, statements: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in statements), encoding="utf-8")
    return path
