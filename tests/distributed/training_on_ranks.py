"""What the ranks of test_training.py do besides training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import environment
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tinyexperts.training import TrainConfig, checkpoint_files
from tinyexperts.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tinyexperts.training.distributed.launch import init_distributed
from tinyexperts.training.run import make_run

TABLE = "model.blocks.1.feed_forward.experts"


def save_again(rank: int, num_ranks: int, port: int, config: TrainConfig, output: Path, file_bytes: int) -> None:
    """Load the last checkpoint of a run and write it elsewhere, without a step between."""
    os.environ |= environment(rank, num_ranks, port)
    with pytest.MonkeyPatch.context() as patch, init_distributed(config) as ranks:
        patch.setattr(checkpoint_files, "FILE_BYTES", file_bytes)
        run = make_run(config, ranks)
        state = load_checkpoint(checkpoints(config.run)[-1], run.model, run.optimizers, ranks=ranks)
        save_checkpoint(output, state["step"], run.model, run.optimizers, state, keep=1, ranks=ranks)


def read_by_rows(rank: int, folder: str, expected: torch.Tensor) -> None:
    """A table that was written by columns is read by rows, and whole."""
    mesh = init_device_mesh("cpu", (2,))
    num_experts, num_vectors, width = expected.shape
    rows = DTensor.from_local(torch.empty(num_experts // 2, num_vectors, width), mesh, [Shard(0)], run_check=False)
    whole = torch.empty(expected.shape)
    for target in (rows, whole):
        dcp.load({TABLE: target}, storage_reader=dcp.HuggingFaceStorageReader(folder))
    assert torch.equal(rows.to_local(), expected.chunk(2)[rank])
    assert torch.equal(whole, expected)
