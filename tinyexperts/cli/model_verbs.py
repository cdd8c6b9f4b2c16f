"""The verbs of a trained model; each imports what it needs when it is called, and computes nothing.

(No `from __future__ import annotations`: tyro could not find the class of a verb's options by its name.)
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tinyexperts.errors import InputError

# The run that `make model` makes.
_MODEL_TO_TRY = Path("runs/airports-int8")


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    data_set: Annotated[Path | None, tyro.conf.arg(name="data")] = None,
    files: tuple[Path, ...] = (),
    text_field: str = "text",
    split: Literal["train", "validation", "unseen-phrasing", "unseen-entities"] = "validation",
    max_tokens: int | None = None,
    tasks: tuple[str, ...] = (),
    task_files: Path | None = None,
    max_questions: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Measure a trained model: loss, perplexity, bits per byte, and the usage of its experts; or tasks of lm-eval.

    On the held-out split of its own data set the results are kept in the run folder (evaluation.json), those on tasks
    in tasks.json.

    Args:
        run: Folder of the run.
        data_set: Another data set, prepared with the tokenizer of this run.
        files: Files and folders to measure on instead: text, source code, .jsonl (.ndjson, .json), .csv, .parquet;
            also as .gz, .bz2, .xz.
        text_field: Field or column that holds the text, for .jsonl, .json, .csv and .parquet files.
        split: Split of the data set; unseen-phrasing and unseen-entities are for data sets of facts.
        max_tokens: Take whole windows of the context's length, evenly spread over the text, until they hold this many
            tokens; bits per byte are not known then.
        tasks: Tasks of lm-eval to measure on instead of text, such as lambada sciq, or lambada,sciq.
        task_files: Folder with the YAML of tasks, such as `data fetch-tasks` writes; default: lm-eval's own tasks, most
            of which download their questions.
        max_questions: The first questions of each task alone.
        batch_size: Windows, or questions, in one forward pass.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
    if tasks:
        _evaluate_tasks(
            *(run, tasks, task_files, max_questions),
            {
                "data": data_set,
                "files": files,
                "text_field": text_field != "text",
                "split": split != "validation",
                "max_tokens": max_tokens,
            },
            batch_size=batch_size,
            device=device,
            threads=threads,
        )
        return
    for name, value in (("task_files", task_files), ("max_questions", max_questions)):
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} is for --tasks, of which there are none: {value}")
    from tinyexperts import training
    from tinyexperts.cli.tables import print_evaluation

    result = training.evaluate_run(
        run,
        data=data_set,
        files=files,
        text_field=text_field,
        split=split,
        max_tokens=max_tokens,
        batch_size=batch_size,
        device=device,
        threads=threads,
    )
    for remark in result.remarks:
        print(remark, file=sys.stderr)
    print_evaluation(result.text, result.evaluation)


def _evaluate_tasks(
    run: Path,
    tasks: tuple[str, ...],
    task_files: Path | None,
    max_questions: int | None,
    of_texts: dict[str, Any],
    **options: Any,
) -> None:
    for name, value in of_texts.items():
        if value:
            raise InputError(f"--{name.replace('_', '-')} is for texts and --tasks are questions: give one of them")
    from tinyexperts import hub
    from tinyexperts.cli.tables import print_tasks

    names = [name for words in tasks for name in words.split(",") if name]
    print_tasks(hub.evaluate_tasks(run, names, task_files=task_files, max_questions=max_questions, **options))


def generate(
    run: Annotated[Path, tyro.conf.Positional],
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    save: bool = False,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Continue a text with a trained model.

    Args:
        run: Folder of the run.
        prompt: Text to continue.
        max_new_tokens: Tokens to add at most; the model may end the text earlier. Default: 64, or what the model's
            context still holds.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw among the k likeliest tokens only.
        top_p: Draw among the likeliest tokens that hold this probability together.
        seed: Seed of the draws.
        save: Append the sample to samples.json of the run folder.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
    from tinyexperts import training
    from tinyexperts.training import run_folder

    completion = training.generate_text(
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=device,
        threads=threads,
    )
    print(prompt + completion)
    if save:
        run_folder.append_sample(run, prompt, completion)


def ask(
    run: Annotated[str, tyro.conf.Positional],
    question: Annotated[str | None, tyro.conf.Positional] = None,
    max_new_tokens: int = 32,
    num_fired: int = 8,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Ask a model for a fact: complete a statement, with the probability and the experts behind the answer.

    Args:
        run: Folder of the run; it may be left out where `make model` has made runs/airports-int8.
        question: Beginning of a statement, such as "The city of SFO is".
        max_new_tokens: Tokens of the answer at most.
        num_fired: Experts to show.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
    if question is None and Path(run).exists():
        raise InputError(f"after the run {run} a question is missing, such as 'The city of SFO is'")
    if question is None:
        run, question = str(_MODEL_TO_TRY), run
        if not _MODEL_TO_TRY.exists():
            raise InputError(f"there is no {_MODEL_TO_TRY}, which `make model` makes: give the folder of a run first")
    from tinyexperts import training
    from tinyexperts.cli.tables import print_answer

    print_answer(
        question,
        training.ask_run(
            run, question, max_new_tokens=max_new_tokens, num_fired=num_fired, device=device, threads=threads
        ),
    )


def inspect(
    run: Annotated[Path, tyro.conf.Positional],
    question: tuple[str, ...] = (),
    output: Path | None = None,
    data_set: Annotated[Path | None, tyro.conf.arg(name="data")] = None,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Write a page about a run's experts: how much each is used, which ones a question fires, and what they hold.

    For a data set of facts it also has the losses of facts without the experts that fire for them.

    Args:
        run: Folder of the run, whose model has a table of experts (PEER, product-key memory).
        question: Beginnings of texts, such as "The city of SFO is" "SFO is the airport of". Default: of facts the best
            answered question of each attribute.
        output: The HTML file; default: inspect.html in the run's folder.
        data_set: Another data set, prepared with the tokenizer of this run.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
    from tinyexperts.explorer import inspect_run

    command = shlex.join(["tinyexperts", *sys.argv[1:]])
    print(
        inspect_run(
            run, questions=question, output=output, data=data_set, device=device, threads=threads, command=command
        )
    )


def quantise(
    run: Annotated[Path, tyro.conf.Positional],
    output: Path,
    bits: Literal[8, 4] = 8,
    data_set: Annotated[Path | None, tyro.conf.arg(name="data")] = None,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Write a run whose tables of experts are integers, for inference, and show what it lost and won.

    Args:
        run: Folder of the run; it stays as it is.
        output: Folder of the new run.
        bits: Bits of an element: 8 (and a scale for each vector) or 4 (and a scale for each 32 elements).
        data_set: Data set whose held-out part both are measured on; default: the run's own.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
    from tinyexperts import training
    from tinyexperts.cli.tables import print_quantized

    print_quantized(
        training.quantize_run(
            run, output, bits=bits, data=data_set, device=device, threads=threads, command=sys.argv[1:]
        )
    )
