"""The evaluation of a run on tasks of lm-eval (EleutherAI's lm-evaluation-harness), by its own loop."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import chdir
from typing import Any

from tinyexperts.data import Tokenizer, printable
from tinyexperts.errors import InputError, require_at_least
from tinyexperts.extras import require_extra
from tinyexperts.files import write_atomically
from tinyexperts.hub.causal_lm import TinyExpertsForCausalLM
from tinyexperts.hub.tokenizer import to_transformers
from tinyexperts.training import choose_device, load_model
from tinyexperts.training.config import path_of
from tinyexperts.training.run_folder import read_record
from tinyexperts.training.trained_run import set_threads

StrPath = str | os.PathLike[str]


def evaluate_tasks(
    run: StrPath,
    tasks: Sequence[str],
    *,
    task_files: StrPath | None = None,
    max_questions: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate the model of a run on tasks of lm-eval; results on all questions are kept in its folder, tasks.json.

    Args:
        run (StrPath): folder of the run.
        tasks (Sequence[str]): names of tasks: those in `task_files`, or else lm-eval's own, most of which download
            their questions.
        task_files (StrPath | None): folder with the YAML of tasks, such as `data fetch-tasks` writes. Files that they
            name lie in it.
        max_questions (int | None): the first questions of each task alone; None: all.
        batch_size (int): questions in one forward pass.
        device (str): auto is cuda where there is one, else cpu.
        threads (int | None): CPU threads; None: as torch chooses.

    Returns:
        The measures of each task by their names, those that end in _stderr their standard errors.

    Raises:
        InputError: no run, no checkpoint, a task that is unknown or can't be read, or a setting out of range.
        MissingExtra: the extra eval is not installed.
    """
    require_extra("eval", __name__)
    if not tasks:
        raise InputError("give the name of a task at least, got none")
    require_at_least(1, "max_questions", max_questions)
    require_at_least(1, "batch_size", batch_size)
    set_threads(threads)
    run = path_of("run", run).resolve()
    own = load_model(run, device=choose_device(device))
    tokenizer = Tokenizer.load(run / "tokenizer.json")

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = None if task_files is None else path_of("task_files", task_files).resolve()
    if folder is not None and not folder.is_dir():
        raise InputError(f"no such folder of tasks: {printable(folder)} (tinyexperts data fetch-tasks writes one)")
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    known = manager.all_tasks
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            where = "lm-eval has" if folder is None else f"{printable(folder)} has"
            raise InputError(f"{where} no task {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    length = own.config.context_length
    model = HFLM(
        pretrained=TinyExpertsForCausalLM.of(own, eos_token_id=tokenizer.end_of_text_id),
        tokenizer=to_transformers(tokenizer, context_length=length),
        max_length=length,
        batch_size=batch_size,
        device=str(own.embedding.weight.device),
        backend="causal",
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with chdir(folder or "."):
            found = simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=max_questions,
                bootstrap_iters=1000,
                log_samples=False,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # of the data sets of tasks
        raise InputError(f"a task of {', '.join(tasks)} can't be evaluated: {' '.join(str(error).split())}") from error
    measures = {name: _numbers(found["results"][name]) for name in found["results"]}
    counts = {name: count["effective"] for name, count in found["n-samples"].items()}
    if max_questions is None:
        content = read_record(run / "tasks.json")
        content |= {name: {"num_questions": counts.get(name), **values} for name, values in measures.items()}
        write_atomically(run / "tasks.json", json.dumps(content, indent=2))
    return measures


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a task's results by name; lm-eval writes "acc,none" and "acc_stderr,none"."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float)
    }
