"""Checkpoints of a run, by torch.distributed.checkpoint in its safetensors format: no pickles.

A checkpoint is a folder step-00000500/ with the tensors (model.<name>, optimizer.<parameter>.<state>) and a
manifest.json that carries the trainer's state and the SHA-256 of each file. It is written under another name
and renamed, so a folder of the final name is whole. Any number of ranks reads what any other number wrote.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tinyexperts.errors import InputError
from tinyexperts.files import write_atomically
from tinyexperts.layers.table_layer import store_tables_in_bf16_
from tinyexperts.model import Transformer
from tinyexperts.optim import LowRankAdam, RowSparseAdam
from tinyexperts.training.checkpoint_files import (
    Unwritten,
    one_process_is_meant,
    reason,
    run_on_all_ranks,
    verified_manifest,
    write_tensors,
)
from tinyexperts.training.config import path_of
from tinyexperts.training.device import report_out_of_memory
from tinyexperts.training.distributed.ranks import ALONE, Ranks
from tinyexperts.training.distributed.sharding import as_part, local
from tinyexperts.training.run_folder import read_config


def checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    return sorted(path for path in Path(run, "checkpoints").glob("step-*") if path.suffix != ".partial")


def last_good_checkpoint(run: Path) -> str:
    """Return a clause that names it, for the message of a failure."""
    found = checkpoints(run)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def save_checkpoint(
    run: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    state: dict[str, Any],
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the checkpoint of a step and delete all but the last ones; all ranks call it together.

    Args:
        run (str | os.PathLike[str]): the folder of the run.
        step (int): the number of steps that were made.
        model (nn.Module): the model.
        optimizers (Sequence[Optimizer]): its optimizers.
        state (dict[str, Any]): the trainer's state, for JSON.
        keep (int): the number of checkpoints to keep.
        ranks (Ranks): the processes that train the model.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: it can't be written (disk full); earlier checkpoints stay as they are.
    """
    tensors = _tensors(model, optimizers, ranks)
    return _write_checkpoint(Path(run), step, tensors, state, keep=keep, ranks=ranks)


class CheckpointWriter:
    """The writer of a run's checkpoints, one after the other; as a context, it waits for the last at the end."""

    def __init__(self, run: Path, *, keep: int, ranks: Ranks, asynchronous: bool) -> None:
        """Prepare the writing.

        Args:
            run (Path): the folder of the run.
            keep (int): the number of checkpoints to keep.
            ranks (Ranks): the processes that train the model.
            asynchronous (bool): write in a thread, from a copy of all tensors; its exchanges have a gloo group of their
                own. (dcp.async_save knows neither files of a part of a table nor replicas that take turns with them.)
        """
        self._run, self._keep, self._ranks, self._asynchronous = run, keep, ranks, asynchronous
        if asynchronous and ranks.groups is not None:
            own_group = dist.new_group(backend="gloo", timeout=ranks.timeout)
            self._ranks = replace(ranks, groups=replace(ranks.groups, all_ranks=own_group))
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Not where a rank is lost, which would be waited for in vain.
        if kind is None or issubclass(kind, InputError):
            self.wait()

    def save(self, step: int, model: nn.Module, optimizers: Sequence[Optimizer], state: dict[str, Any]) -> None:
        """Write the checkpoint of a step, or begin to when the one before is written.

        Args:
            step (int): the number of steps that were made.
            model (nn.Module): the model.
            optimizers (Sequence[Optimizer]): its optimizers.
            state (dict[str, Any]): the trainer's state, for JSON.

        Raises:
            InputError: it, or the one before, could not be written.
        """
        self.wait()
        if not self._asynchronous:
            save_checkpoint(self._run, step, model, optimizers, state, keep=self._keep, ranks=self._ranks)
            return
        tensors = {name: tensor.clone() for name, tensor in _tensors(model, optimizers, self._ranks).items()}
        state = copy.deepcopy(state)

        def write() -> None:
            try:
                _write_checkpoint(self._run, step, tensors, state, keep=self._keep, ranks=self._ranks)
            except Exception as error:
                self._failure = error

        self._thread = threading.Thread(target=write, daemon=True)  # a rank that hangs must not keep the process
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            InputError: the checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _write_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int, ranks: Ranks
) -> Path:
    final = run / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")

    def begin() -> None:
        for left_over in partial.parent.glob("*.partial"):  # by a death
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        manifest = {"step": step, "state": state, "files": files}
        write_atomically(partial / "manifest.json", json.dumps(manifest, indent=2))
        if final.exists():  # the same step again
            _remove(final)
        partial.rename(final)

    try:
        run_on_all_ranks(ranks, begin if ranks.is_first else lambda: None)
        files = write_tensors(tensors, partial, ranks)
        run_on_all_ranks(ranks, finish if ranks.is_first else lambda: None)
    except Unwritten as error:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        sentence = f"the checkpoint of step {step} could not be written ({error}); {last_good_checkpoint(run)}"
        raise InputError(sentence) from error
    if ranks.is_first:
        with suppress(OSError):  # the new one is good, whatever becomes of the old; the next one tries again
            for old in checkpoints(run)[:-keep]:
                _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, renamed first: one that is half deleted must not be taken for good."""
    gone = checkpoint.with_name(f"{checkpoint.name}.old.partial")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def load_checkpoint(
    checkpoint: str | os.PathLike[str],
    model: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    *,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizers, in place.

    Each rank reads its parts of the tensors, in whatever parts they were written.

    Args:
        checkpoint (str | os.PathLike[str]): the folder of the checkpoint.
        model (nn.Module): the model.
        optimizers (Sequence[Optimizer]): its optimizers; without them only the weights are loaded.
        ranks (Ranks): the processes that train the model.

    Returns:
        The trainer's state.

    Raises:
        InputError: a missing, truncated or altered file, tensors that don't fit the model, a weight that is not finite.
    """
    checkpoint = Path(checkpoint)
    manifest = verified_manifest(checkpoint, ranks)
    reader = HuggingFaceStorageReader(str(checkpoint))
    weights = _weights(model, ranks)
    by_name = dict(model.named_parameters())
    own = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    with ranks.raise_on_all_ranks():
        states: list[tuple[Optimizer, nn.Parameter, str, Tensor]] = []
        stored: dict[str, Tensor] = {}
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
            if not name.startswith("optimizer.") or parameter_name not in by_name:
                continue
            parameter = by_name[parameter_name]
            for optimizer, parameters in zip(optimizers, own, strict=True):
                if id(parameter) in parameters:
                    tensor = _empty_state(parameter, entry, ranks)
                    states.append((optimizer, parameter, key, tensor))
                    stored[name] = as_part(tensor, parameter, ranks)
        try:
            with one_process_is_meant(), torch.device("cpu"):  # torch reads to its default device
                load({**weights, **stored}, storage_reader=reader, no_dist=True)
        except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
            raise InputError(f"{checkpoint} does not fit the model: {reason(error)}") from error
        for name, tensor in weights.items():
            if not is_finite(tensor):
                raise InputError(f"{checkpoint} holds weights that are not finite: {name.removeprefix('model.')}")
    for optimizer, parameter, key, tensor in states:
        # AdamW's step counter is on its parameter's device, those of our own optimizers on the CPU.
        stays = isinstance(optimizer, RowSparseAdam | LowRankAdam) and key == "step"
        optimizer.state[parameter][key] = tensor if stays else tensor.to(parameter.device)
    state: dict[str, Any] = manifest["state"]
    return state


def load_model(run: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Transformer:
    """Load the model of a run at its last checkpoint, in evaluation mode.

    Args:
        run (str | os.PathLike[str]): the folder of the run.
        device (torch.device | str): the device of the model.

    Raises:
        InputError: no run, no checkpoint, a damaged one, or weights that are not finite.
    """
    return load_model_and_step(run, device=device)[0]


def load_model_and_step(run: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> tuple[Transformer, int]:
    """Load the model of a run as `load_model` does; return it with the step of its checkpoint."""
    run = path_of("run", run)
    config = read_config(run)
    found = checkpoints(run)
    if not found:
        raise InputError(f"the run {run} has no checkpoint yet")
    with report_out_of_memory(device):
        with torch.device("cpu"):  # whatever torch's default one is
            model = Transformer(config.model)
            if config.optimizer.table_dtype == "bf16":
                store_tables_in_bf16_(model)
        load_checkpoint(found[-1], model)
        return model.to(device).eval(), int(found[-1].name.removeprefix("step-"))


def keep_weights(run: str | os.PathLike[str]) -> None:
    """Replace the checkpoints of a run that has ended by one of its weights, without the optimizers' states.

    Args:
        run (str | os.PathLike[str]): the folder of the run.

    Raises:
        InputError: no checkpoint, or a damaged one.
    """
    run = path_of("run", run)
    model = load_model(run)
    manifest = json.loads((checkpoints(run)[-1] / "manifest.json").read_text(encoding="utf-8"))
    save_checkpoint(run, manifest["step"], model, [], manifest["state"], keep=1)


def is_finite(tensor: Tensor) -> bool:
    """Return True if all elements on this rank are finite; unlike torch.isfinite, without a mask of their size."""
    tensor = local(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, largest = tensor.detach().aminmax()  # NaN where there is one
    return math.isfinite(least) and math.isfinite(largest)


def _weights(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Return parameters and buffers, tied ones once; on several ranks as parts of the whole."""
    parameters = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    return {
        f"model.{name}": as_part(tensor, parameters.get(name, tensor), ranks)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _tensors(model: nn.Module, optimizers: Sequence[Optimizer], ranks: Ranks) -> dict[str, Tensor]:
    tensors = _weights(model, ranks)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = as_part(value, parameter, ranks)
    return tensors


def _empty_state(parameter: Tensor, entry: Any, ranks: Ranks) -> Tensor:
    """Make memory for this rank's part of a tensor of an optimizer's state, stored as `entry`, on the CPU."""
    dtype = entry.properties.dtype
    if isinstance(parameter, DTensor) and entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    is_part = as_part(parameter, parameter, ranks).shape == entry.size
    return torch.empty(parameter.shape if is_part else entry.size, dtype=dtype, device="cpu")
