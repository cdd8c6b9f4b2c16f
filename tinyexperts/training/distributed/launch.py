"""The start of the processes that torchrun launches; without it, a process is the only rank."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tinyexperts.errors import InputError
from tinyexperts.ops.rank_groups import RankGroups
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.config_file import to_json
from tinyexperts.training.distributed.mesh import mesh_shape, with_mesh
from tinyexperts.training.distributed.ranks import ALONE, LostRank, Ranks, named


@contextmanager
def init_distributed(config: TrainConfig) -> Iterator[Ranks]:
    """Join the ranks of this run while open; waits for all of them.

    Raises:
        InputError: the mesh is not that of the ranks, the backend can't be had, the environment is not that of
            torchrun, or the ranks were started with different configurations.
        LostRank: one did not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    backend, shape = _backend(config, size), mesh_shape(config, size)
    if size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    if backend == "nccl":
        torch.cuda.set_device(_local_device())
    timeout = timedelta(seconds=config.distributed.timeout_seconds)
    # Small messages between ranks always go over gloo.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    try:
        launch, rank, _ = next(rendezvous("env://", timeout=timeout))
        launch = PrefixStore("tinyexperts", launch)
        restarted = launch.check(["begun"])
        if size > 1:
            store = PrefixStore(_attempt_joined(launch, rank, size, timeout), launch)
            dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=timeout)
    except ValueError as error:
        raise InputError(f"WORLD_SIZE is {size}, but this is not how torchrun starts a rank: {error}") from None
    except RuntimeError as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        seconds = config.distributed.timeout_seconds
        raise LostRank(f"not all {size} ranks came within {seconds:g} s ({reason})") from error
    if size == 1:
        yield replace(ALONE, restarted=restarted, launch=launch)
        return
    try:
        world = dist.group.WORLD
        assert world is not None
        ranks = Ranks(
            rank=rank,
            size=size,
            restarted=restarted,
            timeout=timeout,
            groups=RankGroups(all_ranks=world, column_ranks=world),
            store=PrefixStore("lost", store),
            launch=launch,
        )
        with ranks.name_lost_ranks():
            _check_all_alike(config, ranks)  # before the mesh: ranks of two meshes would wait for each other
            yield with_mesh(ranks, shape, "cuda" if backend == "nccl" else "cpu")
    finally:
        dist.destroy_process_group()


def _attempt_joined(launch: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Return a name that the ranks of this attempt agree on when all have come.

    The store still holds what earlier attempts left in it, and torchrun counts its restarts node by node. None of an
    earlier attempt lives: torchrun ends the ranks of all nodes before it starts them again.
    """
    own, pause, until = uuid4().hex, 0.02, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        launch.set("attempt", own)
    while True:
        attempt: str = launch.get("attempt").decode()  # of the attempt before, as long as its first rank has not come
        came = [f"{attempt}/{other}" for other in range(size)]
        launch.set(came[rank], own)
        if rank == 0 and launch.check(came):
            launch.set(f"{attempt}/all", b" ".join(launch.multi_get(came)).decode())
        if launch.check([f"{attempt}/all"]) and own in launch.get(f"{attempt}/all").decode().split():
            return attempt
        if time.monotonic() > until:
            absent = [other for other, key in enumerate(came) if not launch.check([key])]
            raise RuntimeError(f"{named(absent or [0])} did not come")
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)


def _backend(config: TrainConfig, size: int) -> str:
    """Choose nccl for ranks on GPUs, gloo for ranks on CPUs, and where there is one rank, either.

    Raises:
        InputError: the backend is not for the device, or is not there; or several ranks on another kind of device.
    """
    kinds = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "cuda": "cuda", "cpu": "cpu"}
    if size > 1 and config.device not in kinds:
        raise InputError(f"several ranks need --device auto, cpu or cuda (a GPU each), got {config.device}")
    if config.distributed.backend == "nccl" and config.device not in ("auto", "cuda"):
        raise InputError(f"backend nccl is for --device cuda, got {config.device}")
    if config.distributed.backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise InputError("backend nccl needs GPUs, and there is none: use --distributed.backend gloo")
    kind = kinds.get(config.device)
    if config.distributed.backend == "gloo" and size > 1 and kind == "cuda":
        where = " on a machine with GPUs" if config.device == "auto" else ""
        raise InputError(f"backend gloo is for --device cpu, got {config.device}{where}")
    if config.distributed.backend != "auto":
        return config.distributed.backend
    return "nccl" if kind == "cuda" and torch.cuda.is_available() else "gloo"


def _local_device() -> int:
    """Return the GPU of this rank: one each.

    Raises:
        InputError: torchrun has not said which rank of its node this is, or the node has fewer GPUs.
    """
    text, num_devices = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if not text.isdecimal() or int(text) >= num_devices:
        raise InputError(
            f"each rank of a node needs a GPU of its own, numbered from 0: LOCAL_RANK is {text!r}, of {num_devices}"
        )
    return int(text)


def _check_all_alike(config: TrainConfig, ranks: Ranks) -> None:
    own = hashlib.sha256(to_json(config).encode()).hexdigest()[:12]
    others = [rank for rank, digest in enumerate(ranks.all_gather_object(own)) if digest != own]
    if others:
        raise InputError(
            f"all ranks must be started with one configuration: that of rank {ranks.rank} (sha256 {own}) is not that "
            f"of {named(others)}"
        )
