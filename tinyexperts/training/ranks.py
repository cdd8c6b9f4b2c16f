"""The processes of one run: what torchrun started, the mesh that they form, and what they agree on.

Started by itself, a process is the only rank and none of this costs anything. Under torchrun the ranks form the mesh
(replicate, table): those of a row share each table by its columns, those of a column hold the same columns.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from tinyexperts.errors import InputError
from tinyexperts.layers.product_key_layer import MIN_COLUMNS
from tinyexperts.ops.rank_groups import RankGroups
from tinyexperts.training.config import TrainConfig

# How long the ranks that a broken connection stopped wait for each other before they name those that did not notice;
# after a time-out also the twentieth part of it, by which ranks may have begun to wait at different times.
_GRACE_SECONDS = 5.0


class LostRank(Exception):
    """A rank did not answer, or is gone; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, as seen from this one; `groups` and `mesh` are None where it is the only one.

    restarted: an earlier attempt of the same torchrun had begun the run
    timeout: how long they wait for each other
    """

    rank: int = 0
    size: int = 1
    restarted: bool = False
    timeout: timedelta | None = None
    groups: RankGroups | None = None
    mesh: DeviceMesh | None = None
    store: dist.Store | None = None
    launch: dist.Store | None = None  # of all attempts of one torchrun

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def all_gather_scalar(self, value: float) -> list[float]:
        """A number of each rank, in their order; costs less than `all_gather_object`."""
        if self.groups is None:
            return [value]
        values = [torch.zeros((), dtype=torch.float64, device="cpu") for _ in range(self.size)]
        dist.all_gather(values, torch.tensor(value, dtype=torch.float64, device="cpu"), group=self.groups.all_ranks)
        return [each.item() for each in values]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; small ones."""
        values = [value] * self.size
        if self.groups is not None:
            dist.all_gather_object(values, value, group=self.groups.all_ranks)
        return values

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """What one rank refuses all refuse; to be entered by all, and to hold no exchange between them.

        Raises:
            InputError: on all, that of the lowest rank that has one or an OSError.
        """
        refusal: InputError | OSError | None = None
        sentence = None
        try:
            yield
        except InputError as error:
            refusal, sentence = error, str(error)
        except OSError as error:
            refusal, sentence = error, f"{error}{f' on rank {self.rank}' if self.size > 1 else ''}"
        sentence = next(filter(None, self.all_gather_object(sentence)), None)
        if sentence is not None:
            raise InputError(sentence) from refusal

    def note_begun(self) -> None:
        """To be said by the first: a restart by torchrun goes on with the run; one after a refusal is refused again."""
        if self.launch is not None:
            self.launch.set("begun", "")

    @contextmanager
    def name_lost_ranks(self) -> Iterator[None]:
        """Where ranks wait for each other.

        Raises:
            LostRank: an exchange timed out or a connection broke; names the ranks that did not notice.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.store is None or not any(sign in text for sign in ("imed out", "onnection", "Broken pipe")):
                raise
            reason = next(line for line in text.splitlines() if line.strip())
            lost = self._who_is_lost(timed_out="imed out" in text)
            raise LostRank(f"{lost} (rank {self.rank} was told: {reason})") from error

    def _who_is_lost(self, *, timed_out: bool) -> str:
        """Each rank that gave up signs; those that have not signed after a while hang or are gone."""
        assert self.store is not None
        assert self.timeout is not None
        lost: list[int] = []
        until = time.monotonic() + max(_GRACE_SECONDS, timed_out * self.timeout.total_seconds() / 20)
        try:
            self.store.set(f"gave up/{self.rank}", "")
            while time.monotonic() < until:
                lost = [rank for rank in range(self.size) if not self.store.check([f"gave up/{rank}"])]
                if not lost:
                    return "the ranks lost each other"
                time.sleep(0.1)
        except RuntimeError:
            return "the process that held the rendezvous is gone"
        return f"{_named(lost)} of {self.size} did not answer in time"


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


ALONE = Ranks()


@contextmanager
def init_distributed(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks of this run, while they are joined; waits for all of them.

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
    timeout = timedelta(seconds=config.timeout_seconds)
    # Small things that ranks tell each other go over gloo always.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    try:
        launch, rank, _ = next(rendezvous("env://", timeout=timeout))
        launch = dist.PrefixStore("tinyexperts", launch)
        restarted = launch.check(["begun"])
        if size > 1:
            store = dist.PrefixStore(_attempt_joined(launch, rank, size, timeout), launch)
            dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=timeout)
    except ValueError as error:
        raise InputError(f"WORLD_SIZE is {size}, but this is not how torchrun starts a rank: {error}") from None
    except RuntimeError as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise LostRank(f"not all {size} ranks came within {config.timeout_seconds:g} s ({reason})") from error
    if size == 1:
        yield replace(ALONE, restarted=restarted, launch=launch)
        return
    try:
        world = dist.group.WORLD
        ranks = Ranks(
            rank=rank,
            size=size,
            restarted=restarted,
            timeout=timeout,
            groups=RankGroups(all_ranks=world, column_ranks=world),
            store=dist.PrefixStore("lost", store),
            launch=launch,
        )
        with ranks.name_lost_ranks():
            _check_all_alike(config, ranks)  # before the mesh: ranks of two meshes would wait for each other
            yield _in_mesh(ranks, shape, "cuda" if backend == "nccl" else "cpu")
    finally:
        dist.destroy_process_group()


def _attempt_joined(launch: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that the ranks of this attempt agree on when all have come.

    The store still holds what earlier attempts left in it, and torchrun counts its restarts node by node. None of an
    earlier attempt lives: torchrun ends the ranks of all nodes before it starts them again.
    """
    own, pause, until = uuid4().hex, 0.02, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        launch.set("attempt", own)
    while True:
        attempt = launch.get("attempt").decode()  # of the attempt before, as long as its first rank has not come
        came = [f"{attempt}/{other}" for other in range(size)]
        launch.set(came[rank], own)
        if rank == 0 and launch.check(came):
            launch.set(f"{attempt}/all", b" ".join(launch.multi_get(came)).decode())
        if launch.check([f"{attempt}/all"]) and own in launch.get(f"{attempt}/all").decode().split():
            return attempt
        if time.monotonic() > until:
            absent = [other for other, key in enumerate(came) if not launch.check([key])]
            raise RuntimeError(f"{_named(absent or [0])} did not come")
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)


def _in_mesh(ranks: Ranks, shape: tuple[int, int], device_type: str) -> Ranks:
    # By hand: the groups that init_device_mesh makes wait half an hour, whatever the others' time-out.
    places = torch.arange(ranks.size, device="cpu").view(shape)
    columns, _ = dist.new_subgroups_by_enumeration(places.tolist(), timeout=ranks.timeout)
    replicas, _ = dist.new_subgroups_by_enumeration(places.T.tolist(), timeout=ranks.timeout)
    mesh = DeviceMesh.from_group([replicas, columns], device_type, mesh=places, mesh_dim_names=("replicate", "table"))
    assert ranks.groups is not None
    groups = replace(ranks.groups, column_ranks=columns, replica_ranks=replicas if shape[0] > 1 else None)
    return replace(ranks, groups=groups, mesh=mesh)


def mesh_shape(config: TrainConfig, size: int) -> tuple[int, int]:
    """(replicate, table) of `size` ranks: as configured, or the largest table group of a node that the width allows.

    Raises:
        InputError: the configured mesh does not multiply up to `size`.
    """
    if config.mesh is not None:
        if math.prod(config.mesh) != size:
            raise InputError(
                f"mesh must multiply up to the number of ranks, {size}, got {config.mesh[0]} x {config.mesh[1]} "
                "(torchrun --nproc-per-node starts several)"
            )
        return config.mesh
    if config.table_second_moment == "row":  # a mean over all columns
        return size, 1
    width, of_node = config.model.d_model, int(os.environ.get("LOCAL_WORLD_SIZE", size))
    fitting = [
        shards
        for shards in range(2, of_node + 1)
        if size % shards == of_node % shards == width % shards == 0 and width // shards >= MIN_COLUMNS
    ]
    num_shards = max(fitting, default=1)
    return size // num_shards, num_shards


def _backend(config: TrainConfig, size: int) -> str:
    """nccl for ranks on GPUs, gloo for ranks on CPUs, and where there is one rank, either.

    Raises:
        InputError: the backend is not for the device, or is not there; or several ranks on another kind of device.
    """
    kinds = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "cuda": "cuda", "cpu": "cpu"}
    if size > 1 and config.device not in kinds:
        raise InputError(f"several ranks need --device auto, cpu or cuda (a GPU each), got {config.device}")
    if config.backend == "nccl" and config.device not in ("auto", "cuda"):
        raise InputError(f"backend nccl is for --device cuda, got {config.device}")
    if config.backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise InputError("backend nccl needs GPUs, and there is none: use --backend gloo")
    kind = kinds.get(config.device)
    if config.backend == "gloo" and size > 1 and kind == "cuda":
        where = " on a machine with GPUs" if config.device == "auto" else ""
        raise InputError(f"backend gloo is for --device cpu, got {config.device}{where}")
    if config.backend != "auto":
        return config.backend
    return "nccl" if kind == "cuda" and torch.cuda.is_available() else "gloo"


def _local_device() -> int:
    """The GPU of this rank: one each.

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
    own = hashlib.sha256(TypeAdapter(TrainConfig).dump_json(config)).hexdigest()[:12]
    others = [rank for rank, digest in enumerate(ranks.all_gather_object(own)) if digest != own]
    if others:
        raise InputError(
            f"all ranks must be started with one configuration: that of rank {ranks.rank} (sha256 {own}) is not that "
            f"of {_named(others)}"
        )
