"""A run as a folder that transformers loads, and back.

config.json, generation_config.json, model*.safetensors   as transformers writes them
tokenizer.json, tokenizer_config.json, chat_template.jinja
README.md                    the model card
modeling_tinyexperts.py      one line, for trust_remote_code=True where nobody imports tinyexperts.hub
run/                         the run's own config.json, run.json and tokenizer.json, for the way back
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig

from tinyexperts.data import Tokenizer, printable
from tinyexperts.errors import InputError
from tinyexperts.hub.causal_lm import TinyExpertsForCausalLM
from tinyexperts.hub.configuration import TinyExpertsConfig
from tinyexperts.hub.model_card import model_card
from tinyexperts.hub.tokenizer import to_transformers
from tinyexperts.layers.table_layer import store_tables_in_bf16_
from tinyexperts.model import Transformer
from tinyexperts.training import TrainConfig, config_file, run_folder
from tinyexperts.training.checkpoint import load_model_and_step
from tinyexperts.training.config import path_of
from tinyexperts.training.finished_run import new_folder, write_finished_run

StrPath = str | os.PathLike[str]


def export_run(run: StrPath, output: StrPath, *, license_id: str) -> Path:
    """Write the last weights of a run as a folder that transformers loads.

    Args:
        run (StrPath): the folder of the run.
        output (StrPath): the new folder.
        license_id (str): the license of the weights, as Hugging Face abbreviates it: mit, apache-2.0, cc-by-4.0, other.

    Returns:
        The new folder.

    Raises:
        InputError: no run, no checkpoint, a license that is no such name, or a folder that exists.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_id):
        raise InputError(f"the license must be a name such as mit, apache-2.0 or other, got {license_id!r}")
    run, output = path_of("run", run), path_of("output", output)
    config = run_folder.read_config(run)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    described = run_folder.described(run)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text_id)
    with new_folder(output) as folder:
        model, step = load_model_and_step(run)
        card = model_card(run, config, step=step, name=output.resolve().name, license_id=license_id)
        wrapper = TinyExpertsForCausalLM.of(model, **ends)
        wrapper.generation_config = GenerationConfig(**ends)
        wrapper.save_pretrained(folder)
        to_transformers(tokenizer, context_length=config.model.context_length).save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        own = folder / "run"
        own.mkdir()
        tokenizer.save(own / "tokenizer.json")
        (own / "config.json").write_text(config_file.to_json(_elsewhere(config, step)), encoding="utf-8")
        described.pop("command", None)  # it may name folders of this machine
        (own / "run.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    return output


def import_run(folder: StrPath, run: StrPath) -> Path:
    """Make a run of an exported folder: it can be evaluated, asked, taught; it has made all its steps.

    Args:
        folder (StrPath): the folder that `export_run` wrote; its weights may have been trained on since.
        run (StrPath): the folder of the new run.

    Returns:
        The folder of the run.

    Raises:
        InputError: no exported folder, files that are damaged, weights that don't fit their configuration, another
            model than the run's, or a run that exists.
    """
    folder, run = path_of("folder", folder), path_of("run", run)
    path = folder / "run" / "config.json"
    try:
        config = replace(config_file.from_json(path.read_bytes()), run=run)
    except OSError as error:
        raise InputError(
            f"{printable(folder)} is not a folder that tinyexperts export wrote: run/config.json can't be read "
            f"({error.strerror})"
        ) from None
    except InputError as error:
        raise InputError(f"{printable(path)} does not hold a configuration: {error}") from None
    if config.num_steps is None:
        raise InputError(f"{printable(path)} must say how many steps the weights have made (num_steps), got none")
    description = run_folder.described(folder / "run")
    Tokenizer.load(folder / "run" / "tokenizer.json")
    with new_folder(run) as new:
        model = _loaded(folder, config)
        if config.optimizer.table_dtype == "bf16":
            store_tables_in_bf16_(model)
        tokenizer = folder / "run" / "tokenizer.json"
        write_finished_run(new, config, model, step=config.num_steps, tokenizer=tokenizer, description=description)
    return run


def _loaded(folder: Path, config: TrainConfig) -> Transformer:
    """Load the model of an exported folder.

    Raises:
        InputError: files that are damaged, or another model than that of the configuration.
    """
    try:
        wrapper = AutoModelForCausalLM.from_pretrained(folder)
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{printable(folder)} can't be loaded: {' '.join(str(error).split())}") from None
    meant = TinyExpertsConfig.of(config.model).transformer()
    if not isinstance(wrapper, TinyExpertsForCausalLM):
        raise InputError(f"{printable(folder)} must hold a TinyExpertsForCausalLM, got {type(wrapper).__name__}")
    found = wrapper.model.config
    other = [field.name for field in fields(meant) if getattr(meant, field.name) != getattr(found, field.name)]
    if other:
        raise InputError(
            f"{printable(folder)} holds another model than run/config.json says: "
            + ", ".join(f"{name} is {getattr(found, name)}, not {getattr(meant, name)}" for name in other)
        )
    return wrapper.model


def _elsewhere(config: TrainConfig, step: int) -> TrainConfig:
    """Return the configuration of a run that has ended, without the folders of this machine."""
    return replace(
        config,
        run=Path(config.run.resolve().name),
        data=Path(config.data.resolve().name),
        teaching=None,
        num_steps=step,
        training_flops=None,
    )
