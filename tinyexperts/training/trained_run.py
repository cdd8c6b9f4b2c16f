"""The use of a trained run: its evaluation on a text, and text that it generates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinyexperts.data import EncodedText, TokenDataset, Tokenizer, TokenSplit, printable
from tinyexperts.data.files import paths_of
from tinyexperts.data.shards.index import SplitName
from tinyexperts.errors import InputError, require_at_least
from tinyexperts.evaluation import Answer, Evaluation, answer, evaluate
from tinyexperts.model import generate
from tinyexperts.training import run_folder
from tinyexperts.training.checkpoint import load_model
from tinyexperts.training.config import path_of
from tinyexperts.training.device import choose_device

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class RunEvaluation:
    """The evaluation of a run on one text."""

    evaluation: Evaluation
    text: str
    """The name of the text."""
    remarks: tuple[str, ...]
    """Sentences about text that was left out, or that the tokenizer lost."""


def evaluate_run(
    run: StrPath,
    *,
    data: StrPath | None = None,
    files: Sequence[StrPath] = (),
    text_field: str = "text",
    split: SplitName = "validation",
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    threads: int | None = None,
) -> RunEvaluation:
    """Evaluate the model of a run, by default on the whole held-out split of its own data.

    The results on that split are kept in the run folder (evaluation.json and files of its own).

    Args:
        run (StrPath): folder of the run.
        data (StrPath | None): another data set, prepared with the tokenizer of this run.
        files (Sequence[StrPath]): files and folders to measure on instead of a data set.
        text_field (str): field or column that holds the text, for .jsonl, .json, .csv and .parquet files.
        split (SplitName): split of the data set; unseen-phrasing and unseen-entities are for facts. For validation
            the model is asked for the facts of all held-out splits.
        max_tokens (int | None): whole windows, evenly spread over the text, until they hold this many tokens; None:
            all.
        batch_size (int): windows in one forward pass.
        device (str): auto is cuda where there is one, else cpu.
        threads (int | None): CPU threads; None: as torch chooses.

    Returns:
        The results, the name of the text, and remarks.

    Raises:
        InputError: no run, no checkpoint, text made by another tokenizer, or a setting out of range.
    """
    if files and data is not None:
        raise InputError(f"give either data or files, got {data} and {len(files)} files")
    require_at_least(1, "max_tokens", max_tokens)
    require_at_least(1, "batch_size", batch_size)
    set_threads(threads)
    run = path_of("run", run)
    model = load_model(run, device=choose_device(device))
    text: EncodedText | TokenSplit
    statements: list[TokenSplit] = []
    remarks: list[str] = []
    if files:
        paths = paths_of(files)
        text = EncodedText(paths, Tokenizer.load(run / "tokenizer.json"), text_field=text_field)
        remarks += [f"left out: {sentence}" for sentence in text.skipped]
        if text.num_empty:
            remarks.append(f"left out: {text.num_empty:,} documents without text")
        name = " ".join(map(printable, paths))
    else:
        folder = run_folder.read_config(run).data if data is None else path_of("data", data)
        dataset = TokenDataset.open(folder)
        run_folder.check_tokenizer(run, dataset)
        text = dataset.split(split)
        asked = dataset.held_out_splits if split == "validation" else [text]
        statements = [each for each in asked if each.facts is not None]
        name = f"{printable(folder)} ({split})"
    if text.text_loss:
        remarks.append(str(text.text_loss))
    is_own = not files and data is None and split == "validation" and max_tokens is None
    known = run_folder.described(run).get("data_sha256")
    if is_own and known is not None and known != dataset.sha256:
        is_own = False
        remarks.append(f"not kept: {name} holds other tokens than those that the run was trained on")
    evaluation = evaluate(model, text, batch_size=batch_size, max_tokens=max_tokens, statements=statements)
    if is_own:
        evaluation.save(run)
    return RunEvaluation(evaluation=evaluation, text=name, remarks=tuple(remarks))


def generate_text(
    run: StrPath,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
) -> str:
    """Return the continuation of a text by the model of a run.

    Args:
        run (StrPath): folder of the run.
        prompt (str): text to continue.
        max_new_tokens (int | None): tokens to add at most; None: 64, or what the model's context still holds.
        temperature (float): 0 takes the likeliest token each time.
        top_k (int | None): draw among the k likeliest tokens only.
        top_p (float | None): draw among the likeliest tokens that hold this probability together.
        seed (int): seed of the draws.
        device (str): auto is cuda where there is one, else cpu.
        threads (int | None): CPU threads; None: as torch chooses.

    Raises:
        InputError: no run, no checkpoint, a prompt that is no UTF-8 or too long, or a setting out of range.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt must be UTF-8, got {prompt!r}") from error
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be between 0 and 2^63 - 1, got {seed}")
    set_threads(threads)
    run, where = path_of("run", run), choose_device(device)
    model = load_model(run, device=where)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text_id]
    if max_new_tokens is None:
        max_new_tokens = max(1, min(64, model.config.context_length - len(ids)))
    tokens = generate(
        model,
        torch.tensor([ids], device=where),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(where).manual_seed(seed),
        end_of_text_id=tokenizer.end_of_text_id,
    )[0].tolist()
    return tokenizer.decode(token for token in tokens[len(ids) :] if token != tokenizer.end_of_text_id)


def ask_run(
    run: StrPath,
    question: str,
    *,
    max_new_tokens: int = 32,
    num_fired: int = 8,
    device: str = "auto",
    threads: int | None = None,
) -> Answer:
    """Return the answer of a run's model to a question, the beginning of a statement.

    Args:
        run (StrPath): folder of the run.
        question (str): the beginning of a statement, such as "The city of SFO is".
        max_new_tokens (int): tokens of the answer at most.
        num_fired (int): experts to report.
        device (str): auto is cuda where there is one, else cpu.
        threads (int | None): CPU threads; None: as torch chooses.

    Raises:
        InputError: no run, no checkpoint, a question that the tokenizer or the context can't hold, or a setting out of
            range.
    """
    require_at_least(1, "max_new_tokens", max_new_tokens)
    require_at_least(0, "num_fired", num_fired)
    set_threads(threads)
    run = path_of("run", run)
    model = load_model(run, device=choose_device(device))
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    return answer(model, tokenizer, question, max_new_tokens=max_new_tokens, num_fired=num_fired)


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads; None leaves them as torch chose.

    Raises:
        InputError: fewer than one.
    """
    require_at_least(1, "threads", threads)
    if threads is not None:
        torch.set_num_threads(threads)
