"""The page of a run's experts: `tinyexperts inspect`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import tinyexperts
from tinyexperts.data import TokenDataset, printable
from tinyexperts.errors import InputError
from tinyexperts.explorer.knock_out import knock_out
from tinyexperts.explorer.page import EXPERTS_PER_HEAD, Explored, findings_of
from tinyexperts.explorer.questions import ask, best_questions
from tinyexperts.explorer.taught_rows import taught_rows
from tinyexperts.explorer.text_sample import draw_texts, use_of_experts
from tinyexperts.files import write_atomically
from tinyexperts.layers import PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import TransformerConfig
from tinyexperts.report.page import Page
from tinyexperts.training import load_model, run_folder
from tinyexperts.training.config import path_of
from tinyexperts.training.device import choose_device
from tinyexperts.training.trained_run import set_threads

StrPath = str | os.PathLike[str]


def inspect_run(
    run: StrPath,
    *,
    questions: Sequence[str] = (),
    output: StrPath | None = None,
    data: StrPath | None = None,
    device: str = "auto",
    threads: int | None = None,
    command: str = "",
) -> Path:
    """Write the page of a run's experts: an HTML file that needs no network.

    It shows the grid of their use, for each question the experts that fire, and for a data set of facts the losses of
    facts without the experts that fire for them.

    Args:
        run (StrPath): folder of the run, whose model has PEER or product-key memory layers.
        questions (Sequence[str]): beginnings of texts; none: of facts the best answered question of each attribute.
        output (StrPath | None): the file; its folder is made, an earlier page is replaced; None: inspect.html in the
            run's folder.
        data (StrPath | None): the data set, prepared with the tokenizer of this run; None: that of the run.
        device (str): auto is cuda where there is one, else cpu.
        threads (int | None): CPU threads; None: as torch chooses.
        command (str): the command that makes the page again.

    Returns:
        The path of the page.

    Raises:
        InputError: no run, no checkpoint, a model without such layers, no data set, one made by another tokenizer, or a
            question that the tokenizer or the context can't hold.
    """
    run = path_of("run", run)
    config = run_folder.read_config(run)
    _check_has_table(run, config.model)
    set_threads(threads)
    model = load_model(run, device=choose_device(device))
    folder = config.data if data is None else path_of("data", data)
    data_set = TokenDataset.open(folder)
    run_folder.check_tokenizer(run, data_set)
    held_out, texts = data_set.split("validation"), draw_texts(data_set.split("train"), model.config.context_length)
    facts = None if held_out.facts is None else held_out.facts.fact_set
    is_chosen = not questions
    if is_chosen and facts is not None:
        questions = best_questions(model, held_out)
    asked = [ask(model, data_set.tokenizer, question, facts) for question in questions]
    wanted = {
        name: sorted({expert.id for question in asked for expert in question.strongest(name, EXPERTS_PER_HEAD)})
        for name in {expert.layer for question in asked for expert in question.answer.experts}
    }
    explored = Explored(
        model=model,
        held_out=held_out,
        questions=asked,
        is_chosen=is_chosen,
        texts=texts,
        use=use_of_experts(model, texts, wanted),
        knock_out=None if facts is None else knock_out(model, held_out),
        taught=taught_rows(run, model),
    )
    page = Page(
        found=replace(findings_of(explored), title=f"The experts of {printable(run.absolute().name)}"),
        subtitle=f"Run {printable(run)}, data set {printable(folder)}",
        command=command,
        made_of=f"tinyexperts {tinyexperts.__version__}, torch {torch.__version__}.",
    )
    path = run / "inspect.html" if output is None else path_of("output", output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.as_html())
    return path


def _check_has_table(run: Path, config: TransformerConfig) -> None:
    layer = config.expert_layer
    if not isinstance(layer, PEERConfig | ProductKeyMemoryConfig) or not config.blocks_with_experts:
        kind = layer.kind if config.blocks_with_experts else config.dense.kind
        raise InputError(
            f"only layers of kind {PEERConfig.kind} and {ProductKeyMemoryConfig.kind} have a table of experts to "
            f"inspect, and {printable(run)} has layers of kind {kind}"
        )
