"""The files of a checkpoint: tensors in safetensors, as torch.distributed.checkpoint lays them out, and their digests.

Each rank writes its part of a tensor; one rank writes what all have. A file gives the place of its part in the whole.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tinyexperts.errors import InputError
from tinyexperts.files import sha256_of_file
from tinyexperts.training.distributed.ranks import Ranks
from tinyexperts.training.distributed.sharding import local

# A table above this is cut into files of this size along its first dimension: a writer holds a file's bytes in memory.
FILE_BYTES = 1 << 28

T = TypeVar("T")


class Unwritten(Exception):
    """A file could not be written on one of the ranks; says why."""


def run_on_all_ranks(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Do some work on each rank.

    Args:
        ranks (Ranks): the ranks, which all call this.
        work (Callable[[], T]): the work of this rank.

    Returns:
        The results of all ranks.

    Raises:
        Unwritten: on all, where it failed on one.
    """
    done, problem = None, None
    try:
        done = work()
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        problem = reason(error)
        if ranks.size > 1:
            failed = isinstance(error, dcp.api.CheckpointException) and error.failures  # by rank; raised on all
            problem += f" on rank {next(iter(failed), ranks.rank) if failed else ranks.rank}"
    outcomes = ranks.all_gather_object((problem, done))
    for why, _ in outcomes:
        if why is not None:
            raise Unwritten(why)
    return [result for _, result in outcomes]


def write_tensors(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> dict[str, str]:
    """Write this rank's part of the tensors.

    Args:
        tensors (dict[str, Tensor]): this rank's tensors by name, DTensors where they are parts of a whole.
        folder (Path): the folder of the files.
        ranks (Ranks): the ranks, which all call this.

    Returns:
        The SHA-256 of each file that any rank wrote, by its name.

    Raises:
        Unwritten: on all ranks, where it failed on one.
    """
    large = {name: tensor for name, tensor in tensors.items() if _is_written_in_parts(tensor)}
    small = {name: tensor for name, tensor in tensors.items() if name not in large}
    run_on_all_ranks(ranks, lambda: _write_large(large, folder, ranks))
    run_on_all_ranks(ranks, lambda: _write_small(small, folder, ranks))
    # The first rank's list, since a folder may lag elsewhere.
    written = run_on_all_ranks(ranks, lambda: sorted(path.name for path in folder.iterdir()))[0]
    shares = run_on_all_ranks(
        ranks, lambda: {name: sha256_of_file(folder / name) for name in written[ranks.rank :: ranks.size]}
    )
    return {name: digest for share in shares for name, digest in sorted(share.items())}


def verified_manifest(checkpoint: Path, ranks: Ranks) -> dict[str, Any]:
    """Return the content of manifest.json after each rank has verified its share of the files.

    Args:
        checkpoint (Path): the folder of the checkpoint.
        ranks (Ranks): the ranks, which all call this.

    Raises:
        InputError: a missing, truncated or altered file.
    """
    with ranks.raise_on_all_ranks():
        try:
            manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
            files = manifest["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{checkpoint} is not a whole checkpoint: manifest.json can't be read ({error})") from None
        for name, digest in list(files.items())[ranks.rank :: ranks.size]:
            path = checkpoint / name
            if not path.is_file():
                raise InputError(f"the checkpoint {checkpoint} lacks its file {name}")
            if sha256_of_file(path) != digest:
                raise InputError(
                    f"{path} is truncated or altered: its SHA-256 is not that of the manifest; "
                    "delete the folder to go back to the checkpoint before it"
                )
    return manifest


def reason(error: BaseException) -> str:
    """Return the first plain sentence in an error, or in those that a CheckpointException collects."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, SafetensorError) and (found := re.search(r"I/O error: (.*) \(os error", str(error))):
        return found[1]
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def one_process_is_meant() -> Iterator[None]:
    """Silence the warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _is_written_in_parts(tensor: Tensor) -> bool:
    """Return True for a large tensor, unless it is FSDP2's: each rank has a small part of these."""
    if isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 1:
        return False
    return tensor.numel() * tensor.element_size() > FILE_BYTES


def _write_small(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> None:
    if ranks.size == 1:
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=dict.fromkeys(tensors, 1))
        with one_process_is_meant():
            save(tensors, storage_writer=writer, no_dist=True)
    else:
        assert ranks.groups is not None
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(tensors, storage_writer=writer, process_group=ranks.groups.all_ranks)


def _write_large(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Write tensors in the form in which DCP's safetensors hold a sharded tensor.

    Names and keys are those that dcp.HuggingFaceStorageReader reads. Replicas take turns with the files.
    """
    for name, whole in tensors.items():
        tensor = local(whole).detach()
        shard, start = "", [0] * tensor.dim()
        if isinstance(whole, DTensor):
            assert ranks.groups is not None
            start[-1] = ranks.groups.own_columns(whole.shape[-1]).start
            shard = f"-columns-{start[-1]:05d}"
        rows = max(1, FILE_BYTES * len(tensor) // (tensor.numel() * tensor.element_size()))
        for number, part in enumerate(torch.split(tensor, rows)):
            if not _is_own_turn(number, ranks):
                continue
            start[0] = number * rows
            sharding = {name: {"saved_offsets": start}}
            file = f"{name}{shard}-{number:05d}.safetensors"
            # A copy, since safetensors looks at the whole storage behind a view.
            save_file(
                {name: part.clone(memory_format=torch.contiguous_format)},
                folder / file,
                metadata={"DCP_SHARDING_INFO": json.dumps(sharding), "format": "pt"},
            )


def _is_own_turn(number: int, ranks: Ranks) -> bool:
    replicas = None if ranks.groups is None else ranks.groups.replica_ranks
    return replicas is None or number % replicas.size() == dist.get_rank(replicas)
