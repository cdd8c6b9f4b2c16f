"""What the ranks of test_foreign_decoders.py do."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny_decoders import VOCAB_SIZE, tiny_decoder
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tinyexperts import PEER
from tinyexperts.hub import replace_feed_forward
from tinyexperts.hub.replacing import decoder_blocks
from tinyexperts.layers import share_query_statistics

NUM_STEPS = 2
LENGTHS = (9, 5, 2, 9)


def peer(width: int) -> PEER:
    torch.manual_seed(1)
    return PEER(width, 64, num_heads=2, experts_per_head=3, query_dim=6)


def decoder(family: str, *, checkpointed: bool) -> torch.nn.Module:
    model = replace_feed_forward(tiny_decoder(family).double(), [1], peer)
    if checkpointed:
        model.activation_checkpointing_enable()
        model.config.use_cache = False
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    """Rows padded on the left, so that ranks have other numbers of real tokens."""
    draw = torch.Generator().manual_seed(2)
    mask = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - length for length in LENGTHS]).long()
    size = (NUM_STEPS, *mask.shape)
    return [
        {"input_ids": ids * mask, "attention_mask": mask} for ids in torch.randint(3, VOCAB_SIZE, size, generator=draw)
    ]


def train(model: torch.nn.Module, rank: int, size: int) -> None:
    """Take steps on this rank's rows, whose part of the loss counts for as many processes as average gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches():
        num_rows = len(LENGTHS) // size
        own = {name: tensor[rank * num_rows : (rank + 1) * num_rows] for name, tensor in batch.items()}
        logits = model(**own).logits[own["attention_mask"] > 0]
        (size * logits.square().sum() / sum(LENGTHS)).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    tensors = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in got.state_dict().items()}
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def train_in_ddp(rank: int, family: str, checkpointed: bool) -> None:
    """Two ranks train as one process on the rows of both."""
    one, ours = (decoder(family, checkpointed=checkpointed) for _ in range(2))
    before = ours.state_dict()["lm_head.weight"].clone()
    train(one, 0, 1)
    train(share_query_statistics(DistributedDataParallel(ours)), rank, dist.get_world_size())
    assert_equal(ours, one)
    assert not torch.allclose(ours.state_dict()["lm_head.weight"], before)


def train_in_fsdp(rank: int, family: str, checkpointed: bool) -> None:
    """The same with every block, and its table, sharded."""
    one, ours = (decoder(family, checkpointed=checkpointed) for _ in range(2))
    train(one, 0, 1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = next(part for part in ours.modules() if isinstance(part, PEER))
    for block in decoder_blocks(ours):
        fully_shard(block, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    assert layer.experts.to_local().shape[0] == 32
    train(share_query_statistics(ours), rank, dist.get_world_size())
    assert_equal(ours, one)
