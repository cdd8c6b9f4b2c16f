"""Checkpoints of a run, by torch.distributed.checkpoint in its safetensors format: no pickles.

A checkpoint is a folder step-00000500/ with the tensors (model.<name>, optimizer.<parameter>.<state>) and a
manifest.json that carries the trainer's state and the SHA-256 of each file. It is written beside and renamed, so what
bears the final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tinyexperts.errors import InputError
from tinyexperts.model import Transformer
from tinyexperts.optim import RowSparseAdam
from tinyexperts.training.device import out_of_memory_told
from tinyexperts.training.run_folder import read_config, write_whole

# A tensor above this is cut into files of this size along its first dimension: a writer holds a file's bytes in memory.
_FILE_BYTES = 1 << 28


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".partial")


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizers: Sequence[Optimizer], state: dict[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of a step and delete all but the last `keep`.

    Raises:
        InputError: it can't be written (disk full); earlier checkpoints stay as they are.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = _tensors(model, optimizers)
        _write(tensors, partial)
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        write_whole(partial / "manifest.json", json.dumps({"step": step, "state": state, "files": files}, indent=2))
        if final.exists():  # the same step again, after a resumption
            shutil.rmtree(final)
        partial.rename(final)
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        earlier = checkpoints(run)
        last = f"the last good checkpoint is {earlier[-1]}" if earlier else "there is no earlier checkpoint"
        raise InputError(f"the checkpoint of step {step} could not be written ({_reason(error)}); {last}") from error
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> dict[str, Any]:
    """Load a checkpoint into the model and the optimisers, in place; returns the trainer's state.

    Raises:
        InputError: a missing, truncated or altered file, tensors that don't fit the model, a weight that is not finite.
    """
    manifest = _verified_manifest(checkpoint)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    stored = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("optimizer.") and optimizers
    }
    weights = _weights(model)
    try:
        with _one_process():
            dcp.load({**weights, **stored}, storage_reader=reader, no_dist=True)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        raise InputError(f"{checkpoint} does not fit the model: {_reason(error)}") from error
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise InputError(f"{checkpoint} holds weights that are not finite: {name.removeprefix('model.')}")
    by_name = dict(model.named_parameters())
    for optimizer in optimizers:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, tensor in stored.items():
            parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
            parameter = by_name[parameter_name]
            if id(parameter) in own:
                # AdamW's step counter lies beside its parameter, RowSparseAdam's on the CPU.
                stays = isinstance(optimizer, RowSparseAdam) and key == "step"
                optimizer.state[parameter][key] = tensor if stays else tensor.to(parameter.device)
    return manifest["state"]


def load_model(run: Path, *, device: torch.device | str = "cpu") -> Transformer:
    """The model of a run at its last checkpoint, in evaluation mode.

    Raises:
        InputError: no run, no checkpoint, a damaged one, or weights that are not finite.
    """
    config = read_config(run)
    found = checkpoints(run)
    if not found:
        raise InputError(f"the run {run} has no checkpoint yet")
    with out_of_memory_told(device):
        model = Transformer(config.model)
        load_checkpoint(found[-1], model)
        return model.to(device).eval()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name not in tied}


def _tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    tensors = _weights(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are; unlike torch.isfinite it makes no mask of the size of a table."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, largest = tensor.detach().aminmax()  # NaN where there is one
    return math.isfinite(least) and math.isfinite(largest)


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    large = {name: t for name, t in tensors.items() if t.numel() * t.element_size() > _FILE_BYTES}
    small = {name: t for name, t in tensors.items() if name not in large}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=dict.fromkeys(small, 1))
    with _one_process():
        dcp.save(small, storage_writer=writer, no_dist=True)
    for name, tensor in large.items():
        _write_in_parts(name, tensor, folder)


def _write_in_parts(name: str, tensor: Tensor, folder: Path) -> None:
    """The form in which DCP's safetensors hold a sharded tensor: each file says where its part lies in the whole.

    Their names and keys are those that dcp.HuggingFaceStorageReader reads.
    """
    rows = max(1, _FILE_BYTES * len(tensor) // (tensor.numel() * tensor.element_size()))
    for number, part in enumerate(tensor.detach().split(rows)):
        offsets = [number * rows] + [0] * (tensor.dim() - 1)
        sharding = {name: {"saved_offsets": offsets}}
        # A copy, since safetensors looks at the whole storage behind a view.
        save_file(
            {name: part.clone(memory_format=torch.contiguous_format)},
            folder / f"{name}-{number:05d}.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(sharding), "format": "pt"},
        )


@contextmanager
def _one_process() -> Iterator[None]:
    """That there is no process group is meant, and needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _verified_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint} is not a whole checkpoint: manifest.json can't be read ({error})") from None
    for name, digest in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise InputError(f"the checkpoint {checkpoint} lacks its file {name}")
        if _sha256(path) != digest:
            raise InputError(
                f"{path} is truncated or altered: its SHA-256 is not that of the manifest; "
                "delete the folder to go back to the checkpoint before it"
            )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """The first plain sentence in an error, or in those that a CheckpointException collects."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
