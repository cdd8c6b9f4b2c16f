"""An exported model behind transformers' own server: completions, chats, streams, continuous batching."""

from __future__ import annotations

import os

import transformers

from tinyexperts.data import printable
from tinyexperts.errors import InputError
from tinyexperts.extras import require_extra
from tinyexperts.hub.causal_lm import TinyExpertsForCausalLM
from tinyexperts.training import choose_device
from tinyexperts.training.config import path_of


def serve(
    folder: str | os.PathLike[str],
    *,
    host: str = "localhost",
    port: int = 8000,
    continuous_batching: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Serve an exported model with the API of OpenAI, until the process is stopped.

    Args:
        folder (str | os.PathLike[str]): the folder that `export_run` or `save_pretrained` wrote, with its tokenizer.
        host (str): the address to listen at.
        port (int): the port.
        continuous_batching (bool): join requests into one batch, with a paged cache.
        device (str): auto is cuda where there is one, else cpu.
        dtype (str): the type of the weights: auto takes that of the files; float32, bfloat16, float16.

    Raises:
        InputError: no exported model there, a port out of range, or a device that is missing.
        MissingExtra: the extra serve is not installed.
    """
    require_extra("serve", __name__)
    folder = path_of("folder", folder)
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise InputError(
                f"{printable(folder)} is not an exported model: it has no {name} (tinyexperts export makes one)"
            )
    if not 0 < port < 2**16:
        raise InputError(f"port must be between 1 and 65535, got {port}")
    device = str(choose_device(device))
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    # The server looks for a model's class among the names of transformers, whose module it may have as another object.
    for module in (transformers, model_manager.transformers):
        module.TinyExpertsForCausalLM = TinyExpertsForCausalLM
    Serve(
        force_model=str(folder),
        continuous_batching=continuous_batching,
        device=device,
        dtype=dtype,
        host=host,
        port=port,
    )
