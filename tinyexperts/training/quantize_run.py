"""The tables of a run in fewer bits: another run, and what it lost and won."""

from __future__ import annotations

import copy
import os
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tinyexperts.data import TokenDataset
from tinyexperts.evaluation import Evaluation, evaluate
from tinyexperts.layers import ProductKeyLayer, TableBits
from tinyexperts.layers.table_layer import check_table_bits
from tinyexperts.model import Transformer, generate
from tinyexperts.training import run_folder
from tinyexperts.training.checkpoint import load_model_and_step
from tinyexperts.training.config import path_of
from tinyexperts.training.device import choose_device
from tinyexperts.training.finished_run import new_folder, write_finished_run
from tinyexperts.training.trained_run import set_threads

StrPath = str | os.PathLike[str]

# Times that each model generates a text, in turns.
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A model with its tables as they are stored, measured."""

    bits: int
    """Bits of an element, scales not counted."""
    table_bytes: int
    """Bytes of all tables, with their scales."""
    bytes_per_token: int
    """Bytes of the rows that a token reads."""
    tokens_per_second: float
    """Tokens that are generated in a second, one text at a time: the median of five."""
    evaluation: Evaluation | None
    """The results on the held-out part of the run's data; None: these are gone."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A run whose tables were quantized."""

    before: Tables
    after: Tables
    remarks: tuple[str, ...]


def quantize_run(
    run: StrPath,
    output: StrPath,
    *,
    bits: TableBits = 8,
    data: StrPath | None = None,
    device: str = "auto",
    threads: int | None = None,
    command: Sequence[str] | None = None,
) -> Quantized:
    """Write a run whose tables are integers, for inference, and measure it beside the run that it was made of.

    Args:
        run (StrPath): folder of the run; it stays as it is.
        output (StrPath): folder of the new run.
        bits (int): 8 (a scale for each vector) or 4 (a scale for each 32 elements).
        data (StrPath | None): the data set whose held-out part both are measured on; None: the run's own.
        device (str): auto is cuda where there is one, else cpu.
        threads (int | None): CPU threads; None: as torch chooses.
        command (Sequence[str] | None): the arguments of `tinyexperts`, which run.json keeps; None from Python.

    Returns:
        Sizes, speed and results before and after.

    Raises:
        InputError: no run, no checkpoint, other bits, a model without tables or whose tables are quantized or not
            finite, a data set of another tokenizer, or a folder that exists.
    """
    check_table_bits(bits)
    set_threads(threads)
    run, output = path_of("run", run), path_of("output", output)
    config = run_folder.read_config(run)
    folder = config.data if data is None else path_of("data", data)
    dataset, remarks = None, list[str]()
    with new_folder(output) as new:
        if data is not None or folder.is_dir():
            dataset = TokenDataset.open(folder)
            run_folder.check_tokenizer(run, dataset)
        else:
            remarks.append(f"not evaluated: the run's data set {folder} is gone (--data names another folder)")
        where = choose_device(device)
        model, step = load_model_and_step(run, device=where)
        quantized = copy.deepcopy(model)
        quantized.quantize_(bits)
        speeds = _tokens_per_second([model, quantized])
        before, after = (
            _measured(each, dataset, speed) for each, speed in zip((model, quantized), speeds, strict=True)
        )
        description = run_folder.described(run) | {
            "command": "quantize_run(...), from Python" if command is None else shlex.join(("tinyexperts", *command)),
        }
        tokenizer = run / "tokenizer.json"
        own = replace(config, run=output)
        write_finished_run(new, own, quantized.cpu(), step=step, tokenizer=tokenizer, description=description)
        if after.evaluation is not None and data is None:
            after.evaluation.save(new)
    return Quantized(before=before, after=after, remarks=tuple(remarks))


def _measured(model: Transformer, dataset: TokenDataset | None, tokens_per_second: float) -> Tables:
    layers = [block.feed_forward for block in model.blocks if isinstance(block.feed_forward, ProductKeyLayer)]
    evaluation = None
    if dataset is not None:
        held_out = dataset.split("validation")
        statements = [split for split in dataset.held_out_splits if split.facts is not None]
        evaluation = evaluate(model, held_out, statements=statements)
    return Tables(
        bits=layers[0].table_bits or 8 * layers[0].experts.element_size(),
        table_bytes=sum(len(layer.experts) * layer.row_bytes for layer in layers),
        bytes_per_token=sum(layer.retrieved_per_token * layer.row_bytes for layer in layers),
        tokens_per_second=tokens_per_second,
        evaluation=evaluation,
    )


def _tokens_per_second(models: Sequence[Transformer]) -> list[float]:
    """Return the tokens a second that each model generates, in turns, so that both meet the same machine."""
    context = models[0].config.context_length
    num_new = max(1, min(128, context - 1))
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=models[0].embedding.weight.device)
    seconds: list[list[float]] = [[] for _ in models]
    for repeat in range(_REPEATS + 1):
        for model, found in zip(models, seconds, strict=True):
            started = time.perf_counter()
            generate(model, prompt, max_new_tokens=num_new, temperature=0)
            if repeat:  # the first compiles
                found.append(time.perf_counter() - started)
    return [num_new / statistics.median(found) for found in seconds]
