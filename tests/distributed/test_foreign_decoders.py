"""Decoders of transformers with a replaced layer, in two processes."""

from __future__ import annotations

import pytest
from foreign_decoders_on_ranks import train_in_ddp, train_in_fsdp
from ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("train", [train_in_ddp, train_in_fsdp])
def test_ranks_train_as_one_process(train, family, checkpointed):
    run_ranks(train, 2, family, checkpointed)
