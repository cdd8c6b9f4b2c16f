"""One verb, one function, which imports what it needs when it is called; nothing is computed here.

A verb with the options of a configuration is made by a function: the class of its options takes an import. (No
`from __future__ import annotations`: tyro could not find such a class by its name.)
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tinyexperts.errors import InputError

if TYPE_CHECKING:
    from tinyexperts.training import TrainConfig


def prepare() -> Callable[..., None]:
    """Turn text into a data set of tokens: Python's standard library, files, or a Hugging Face data set."""
    from tinyexperts import data

    def prepare(config: Annotated[data.PrepareConfig, tyro.conf.arg(name="")]) -> None:
        print(data.prepare(config))

    return prepare


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Check a data set's files against their checksums, and show its sizes.

    Args:
        folder: Folder of the data set.
    """
    from tinyexperts import data

    data_set = data.TokenDataset.open(folder)
    print(f"{data.printable(folder)} is whole: vocabulary {data_set.index.vocab_size:,}")
    for name, record in data_set.index.splits.items():
        loss = data_set.split(name).text_loss
        print(
            f"  {name}: {record.num_documents:,} documents, {record.num_tokens:,} tokens, {record.num_bytes:,} bytes"
            + (f"; {loss}" if loss else "")
        )


def fetch(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    output: Path = Path("texts"),
    max_mb: float = 20.0,
) -> None:
    """Download public texts, with their licenses, as files for `data prepare --files`; without names, list them.

    Args:
        names: Names of the texts; none: list them.
        output: Folder for <name>.jsonl.
        max_mb: Megabytes (1e6 bytes of text) to read of a data set of the Hugging Face hub.
    """
    from tinyexperts import data
    from tinyexperts.cli.tables import print_texts

    if not 0 < max_mb < float("inf"):
        raise InputError(f"--max-mb must be positive and finite, got {max_mb}")
    if not names:
        print_texts()
    for name in names:
        data.corpus_to_fetch(name)
    for name in names:
        with data.byte_progress() as progress:
            fetched = data.fetch_corpus(name, output, max_bytes=round(max_mb * 1e6), progress=progress)
        print(fetched)


def train_recipe(name: str) -> Callable[..., None]:
    """Return the command that trains a recipe, or resumes a run of it, whose settings are then its defaults."""
    from tinyexperts import training
    from tinyexperts.training.recipes import RECIPES

    default = _resumed(name, sys.argv[3:]) or RECIPES[name]()

    def train(
        config: Annotated[training.TrainConfig, tyro.conf.arg(name="")] = default,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        """Train a recipe, or resume a run of it.

        Args:
            resume: Continue from the last checkpoint of the run folder, with its settings: no need to give them again.
            progress: Show a progress bar.
        """
        training.train(config, resume=resume, progress=progress, command=sys.argv[1:])

    return train


def _resumed(name: str, options: Sequence[str]) -> "TrainConfig | None":
    """Return the configuration of the run that the options resume.

    Raises:
        InputError: the folder is not that of a run, or of a run of another recipe.
    """
    from tinyexperts.training import run_folder
    from tinyexperts.training.config import path_of
    from tinyexperts.training.recipes import RECIPES

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run", nargs="?", default=RECIPES[name]().run)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    typed, _ = parser.parse_known_args(options)
    if not typed.resume or typed.run is None:
        return None
    run = path_of("run", typed.run)
    config = run_folder.read_config(run)
    kind = config.model.expert_layer.kind
    own = [recipe_name for recipe_name, recipe in RECIPES.items() if recipe().model.expert_layer.kind == kind]
    if name not in own:
        raise InputError(f"{run} is a run of {own[0]}, which train {own[0]} --run {run} --resume continues, got {name}")
    return dataclasses.replace(config, run=run)  # it may have been moved


def plan_recipe(name: str) -> Callable[..., None]:
    """Return the command that plans a recipe."""
    from tinyexperts import planning, training
    from tinyexperts.cli.tables import print_plans
    from tinyexperts.planning import devices as devices_of_plan
    from tinyexperts.training.recipes import RECIPES

    def plan(
        devices: str,
        config: Annotated[training.TrainConfig, tyro.conf.arg(name="")] = RECIPES[name](),  # noqa: B008
        devices_per_node: int = 8,
        tflops: float = devices_of_plan.H100_TFLOPS,
        memory_gb_per_second: float = devices_of_plan.H100_MEMORY_GB_PER_SECOND,
        link_gb_per_second: float = devices_of_plan.H100_LINK_GB_PER_SECOND,
        node_link_gb_per_second: float = devices_of_plan.H100_NODE_LINK_GB_PER_SECOND,
    ) -> None:
        """Predict the memory, the communication and the time that a recipe takes on several devices.

        Args:
            devices: Number of devices and the memory of each: 8x80GB.
            devices_per_node: Devices of one node, between which exchanges are fast.
            tflops: Peak of a device in TFLOP/s, of which 40 % are counted on; default: an H100 SXM in bf16.
            memory_gb_per_second: GB/s between a device and its memory.
            link_gb_per_second: GB/s that a device sends to the others of its node.
            node_link_gb_per_second: GB/s that a device sends to those of other nodes; an exchange that spans nodes
                goes at this speed.
        """
        parsed = planning.Devices.parse(
            devices,
            per_node=devices_per_node,
            tflops=tflops,
            memory_gb_per_second=memory_gb_per_second,
            link_gb_per_second=link_gb_per_second,
            node_link_gb_per_second=node_link_gb_per_second,
        )
        print_plans(config, parsed, planning.plan(config, parsed))

    return plan


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    data_set: Annotated[Path | None, tyro.conf.arg(name="data")] = None,
    files: tuple[Path, ...] = (),
    text_field: str = "text",
    split: Literal["train", "validation", "unseen-phrasing", "unseen-entities"] = "validation",
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Measure a trained model: loss, perplexity, bits per byte, and the usage of its experts.

    On the held-out split of its own data set the results are kept in the run folder (evaluation.json).

    Args:
        run: Folder of the run.
        data_set: Another data set, prepared with the tokenizer of this run.
        files: Files and folders to measure on instead: text, source code, .jsonl (.ndjson, .json), .csv, .parquet;
            also as .gz, .bz2, .xz.
        text_field: Field or column that holds the text, for .jsonl, .json, .csv and .parquet files.
        split: Split of the data set; unseen-phrasing and unseen-entities are for data sets of facts.
        max_tokens: Take whole windows of the context's length, evenly spread over the text, until they hold this many
            tokens; bits per byte are not known then.
        batch_size: Windows in one forward pass.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
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
    run: Annotated[Path, tyro.conf.Positional],
    question: Annotated[str, tyro.conf.Positional],
    max_new_tokens: int = 32,
    num_fired: int = 8,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Ask a model for a fact: complete a statement, with the probability and the experts behind the answer.

    Args:
        run: Folder of the run.
        question: Beginning of a statement, such as "The city of NRT is".
        max_new_tokens: Tokens of the answer at most.
        num_fired: Experts to show.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
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
        question: Beginnings of texts, such as "The city of NRT is" "NRT is the airport of". Default: of facts the best
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


def demo() -> Callable[..., None]:
    """Train PEER and its dense twin at equal training FLOPs on facts about airports, and write a report."""
    from tinyexperts.study.demo import DemoConfig, run_demo

    def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
        run_demo(config)

    return demo


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    output: Path | None = None,
    title: str | None = None,
    baseline: str | None = None,
) -> None:
    """Write a report that compares runs, or the report of a study.

    Folders named <method>-seed<k> count as seeds of a method.

    Args:
        runs: Folders of the runs, or of one study.
        output: The HTML file; default: report.html here, and in a study's folder always.
        title: Its title; default: "Runs compared".
        baseline: The method that the others are compared with; default: dense.
    """
    from tinyexperts.comparison.report import write_report
    from tinyexperts.study.all_studies import study_named
    from tinyexperts.study.runner.study_folder import StudyFolder
    from tinyexperts.study.study_report import write_study_report

    command = shlex.join(["tinyexperts", *sys.argv[1:]])
    studies = [run for run in runs if (run / "study.json").exists()]
    if not studies:
        path = output or Path("report.html")
        write_report(runs, path, command=command, title=title or "Runs compared", baseline=baseline or "dense")
        print(path)
        return
    if len(runs) > 1:
        raise InputError(f"a study's report is of one folder, got {len(runs)}: {' '.join(map(str, runs))}")
    for option, value in (("--output", output), ("--title", title), ("--baseline", baseline)):
        if value is not None:
            raise InputError(f"{option} is for a report of runs, and {runs[0]} is a study, got {value}")
    folder = StudyFolder(runs[0])
    print(write_study_report(study_named(folder.settings().study), folder, command=command))


def study_command(name: str) -> Callable[..., None]:
    """Return the command that runs one of the studies."""
    from tinyexperts.study.all_studies import study_named
    from tinyexperts.study.run_study import StudyConfig, run_study

    def run(config: Annotated[StudyConfig, tyro.conf.arg(name="")] = StudyConfig()) -> None:  # noqa: B008
        run_study(study_named(name), config)

    return run


def study_status(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Show which runs of a study are done, running, begun, waiting or failed, and why.

    Args:
        folder: Folder of the study.
    """
    from tinyexperts.study.runner.status import print_status
    from tinyexperts.study.runner.study_record import StudyRecord

    print_status(StudyRecord(folder))


def run_of_study(folder: Annotated[Path, tyro.conf.Positional], name: Annotated[str, tyro.conf.Positional]) -> None:
    """Train or resume one run of a study, and evaluate it.

    Args:
        folder: Folder of the study.
        name: Name of the run.
    """
    from tinyexperts.study.runner.planned_run import finish_run

    finish_run(folder, name)


def bench_layer() -> Callable[..., None]:
    """Measure PEER on this machine: its operator against the memory's limit, its parts, and its baselines."""
    from tinyexperts import bench

    def bench_layer(config: Annotated[bench.LayerBenchmarkConfig, tyro.conf.arg(name="")]) -> None:
        bench.run_layer_benchmark(config)

    return bench_layer
