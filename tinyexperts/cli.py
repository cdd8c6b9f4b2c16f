"""The command line: one verb, one function; nothing is computed here."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from rich.console import Console
from rich.table import Table

from tinyexperts import data, evaluation, study, training
from tinyexperts.errors import InputError
from tinyexperts.model import generate as generate_tokens
from tinyexperts.training import recipes, run_folder


def prepare(config: Annotated[data.PrepareConfig, tyro.conf.arg(name="")]) -> None:
    """Turn text into a data set of tokens: this Python's standard library, files, or a Hugging Face data set."""
    print(data.prepare(config))


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Check a data set's files against their checksums and show what it holds.

    Args:
        folder: Folder of the data set.
    """
    data_set = data.TokenDataset.open(folder)
    print(f"{folder} is whole: vocabulary {data_set.index.vocab_size:,}")
    for name in ("train", "validation"):
        split = data_set.split(name)
        print(f"  {name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_bytes:,} bytes")


def _train(recipe: Callable[[], training.TrainConfig]) -> Callable[..., None]:
    """The command that trains a recipe."""
    default = recipe()

    def train(
        config: Annotated[training.TrainConfig, tyro.conf.arg(name="")] = default,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        """
        Args:
            resume: Go on from the last checkpoint of the run folder.
            progress: Show a progress bar.
        """
        training.train(config, resume=resume, progress=progress)

    train.__doc__ = f"{recipe.__doc__}\n{train.__doc__}"
    return train


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    data_set: Annotated[Path | None, tyro.conf.arg(name="data")] = None,
    files: tuple[Path, ...] = (),
    split: str = "validation",
    max_tokens: int | None = None,
    batch_size: int = 8,
    threads: int | None = None,
) -> None:
    """Measure a trained model: loss, perplexity, bits per byte and, for PEER and product-key memory, expert usage.

    On the held-out split of its own data set the results are kept in the run folder (evaluation.json).

    Args:
        run: Folder of the run.
        data_set: Another data set, prepared with the tokenizer of this run.
        files: Files and folders to measure on instead: text, source code, .jsonl, .parquet, .gz.
        split: Split of the data set: validation or train.
        max_tokens: Take windows of so many tokens, evenly spread; bits per byte are not known then.
        batch_size: Windows in one forward pass.
        threads: CPU threads; default: as torch chooses.
    """
    if files and data_set is not None:
        raise InputError(f"give either --data or --files, got {data_set} and {len(files)} files")
    if min(max_tokens or 1, batch_size, threads or 1) < 1:
        raise InputError(
            f"--max-tokens, --batch-size and --threads must be at least 1, got {max_tokens}, {batch_size}, {threads}"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    model = training.load_model(run)
    own_data = run_folder.read_config(run).data
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    tokens: data.EncodedText | data.TokenSplit
    if files:
        tokens = data.EncodedText(files, tokenizer)
    else:
        opened = data.TokenDataset.open(data_set or own_data)
        run_folder.check_tokenizer(run, opened)
        tokens = opened.split(split)
    result = evaluation.evaluate(model, tokens, batch_size=batch_size, max_tokens=max_tokens)
    summary = result.summary()
    if not files and data_set is None and split == "validation" and max_tokens is None:
        run_folder.write_evaluation(run, summary, {name: usage.share for name, usage in result.expert_usage.items()})
    _print_evaluation(str(files[0]) if files else f"{data_set or own_data} ({split})", summary)


def _print_evaluation(text: str, summary: dict[str, Any]) -> None:
    table = Table(title=text, title_justify="left")
    for column in ("routing", "nats a token", "perplexity", "bits a byte", "nats, new bigrams", "tokens"):
        table.add_column(column, justify="left" if column == "routing" else "right")
    for row in filter(None, (summary, summary.get("whole_sequences"))):
        bits = row["bits_per_byte"]
        table.add_row(
            row["routing"] or "",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            "unknown" if bits is None else f"{bits:.4f}",
            f"{row['loss_by_copy']['new']:.4f}",
            f"{row['num_tokens']:,}",
        )
    console = Console()
    console.print(table)
    for usage in summary["expert_usage"]:
        console.print(
            f"{usage['layer']}: {usage['usage']:.1%} of {usage['num_experts']:,} experts used, unevenness "
            f"{usage['unevenness']:.2f} nats, Gini {usage['gini']:.2f}, {usage['num_dead']:,} dead",
            highlight=False,
        )


def generate(
    run: Annotated[Path, tyro.conf.Positional],
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    save: bool = False,
    threads: int | None = None,
) -> None:
    """Continue a text with a trained model.

    Args:
        run: Folder of the run.
        prompt: Text to continue.
        max_new_tokens: Tokens to add at most; the model may end the text earlier.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw among the k likeliest tokens only.
        top_p: Draw among the likeliest tokens that hold this probability together.
        seed: Of the draws.
        save: Append the sample to samples.json of the run folder.
        threads: CPU threads; default: as torch chooses.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model = training.load_model(run)
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text_id]
    tokens = generate_tokens(
        model,
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
        end_of_text_id=tokenizer.end_of_text_id,
    )[0].tolist()
    completion = tokenizer.decode(token for token in tokens[len(ids) :] if token != tokenizer.end_of_text_id)
    if save:
        run_folder.append_sample(run, prompt, completion)
    print(prompt + completion)


def demo(config: Annotated[study.DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Train PEER and its dense twin at equal training FLOPs on this Python's standard library, and write a report."""
    study.run_demo(config)


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    output: Path = Path("report.html"),
    title: str = "Runs compared",
    baseline: str = "dense",
) -> None:
    """Write a report that compares runs, from their folders named <method>-seed<k>.

    Args:
        runs: Folders of the runs.
        output: The HTML file.
        title: Its title.
        baseline: The method that the others are compared with.
    """
    study.write_report(runs, output, command=shlex.join(["tinyexperts", *sys.argv[1:]]), title=title, baseline=baseline)
    print(output)


def _group(description: str, commands: dict[str, Callable[..., None]]) -> Callable[..., None]:
    """A verb with verbs of its own."""
    verbs = [Annotated[Any, tyro.conf.subcommand(name=name, constructor=verb)] for name, verb in commands.items()]

    def group(command: Any) -> None:
        """The chosen verb has run when this is called."""

    group.__annotations__["command"] = Annotated[Union[tuple(verbs)], tyro.conf.arg(name="")]  # noqa: UP007
    group.__doc__ = description
    return group


RECIPES = (recipes.peer, recipes.dense, recipes.expert_choice_moe, recipes.product_key_memory)

VERBS = {
    "data": _group("Prepare data sets of tokens, and verify them.", {"prepare": prepare, "verify": verify}),
    "train": _group(
        "Train a language model by a recipe; --help after the recipe's name lists every setting.",
        {recipe.__name__.replace("_", "-"): _train(recipe) for recipe in RECIPES},
    ),
    "evaluate": evaluate,
    "generate": generate,
    "study": _group("Train and compare several models, and write reports.", {"demo": demo, "report": report}),
}


def main() -> None:
    """Run a verb; bad input is one sentence and exit code 2, an interruption 130."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="tinyexperts",
            description="Train, measure and use language models with PEER layers.",
            config=(tyro.conf.AvoidSubcommands,),
        )
    except InputError as error:
        print(f"tinyexperts: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # an unwritable folder, a full disk
        print(f"tinyexperts: {error}", file=sys.stderr)
        sys.exit(2)
    except (training.Interrupted, KeyboardInterrupt) as stop:
        print(f"tinyexperts: {str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
