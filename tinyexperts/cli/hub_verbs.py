"""The verbs of other people's software; each imports what it needs when it is called, and computes nothing.

(No `from __future__ import annotations`: tyro could not find the class of a verb's options by its name.)
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def export(
    run: Annotated[Path, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    license: str,
) -> None:
    """Write a run's model as a folder for Hugging Face's transformers, with a model card.

    Args:
        run: Folder of the run.
        output: New folder.
        license: License of the weights, as Hugging Face abbreviates it: mit, apache-2.0, cc-by-4.0, other.
    """
    from tinyexperts import hub

    print(hub.export_run(run, output, license_id=license))


def import_model(
    folder: Annotated[Path, tyro.conf.Positional],
    run: Path | None = None,
) -> None:
    """Make a run of an exported folder, to evaluate, ask, inspect or teach its model.

    Args:
        folder: Folder that `tinyexperts export` wrote; its weights may have been trained on since.
        run: Folder of the new run; default: runs/ and the folder's name.
    """
    from tinyexperts import hub

    print(hub.import_run(folder, run or Path("runs", folder.resolve().name)))


def serve(
    folder: Annotated[Path, tyro.conf.Positional],
    host: str = "localhost",
    port: int = 8000,
    continuous_batching: bool = False,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Serve an exported model with the API of OpenAI, by transformers' own server.

    Args:
        folder: Folder that `tinyexperts export` wrote.
        host: Address to listen at.
        port: Port.
        continuous_batching: Join requests into one batch, with a paged cache.
        device: auto is cuda where there is one, else cpu.
        dtype: Type of the weights; auto takes that of the files.
    """
    from tinyexperts import hub

    hub.serve(folder, host=host, port=port, continuous_batching=continuous_batching, device=device, dtype=dtype)
