"""The memory of activations in training, counted by running a forward and a backward pass on fake tensors."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyexperts.model import Transformer, TransformerConfig
from tinyexperts.training.device import autocast


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The bytes that a forward and a backward pass hold besides parameters and gradients of tables."""

    bytes: float
    """Bytes for any number of tokens: the weights in bf16, say."""
    bytes_of_token: float


@functools.lru_cache(maxsize=256)  # a pass on fake tensors takes seconds, and the runs of a study share their models
def count_activations(config: TransformerConfig, device: torch.device, precision: str) -> Activations:
    """Count the activations of a model.

    Args:
        config (TransformerConfig): the model.
        device (torch.device): a kind of device, which this machine need not have.
        precision (str): "fp32" or "bf16".
    """
    # Enough sequences that activations rule: with few of them the peak is where all gradients are there.
    few, many = (_peak_bytes(config, device, precision, num_sequences) for num_sequences in (64, 128))
    return Activations(bytes=2 * few - many, bytes_of_token=(many - few) / (64 * config.context_length))


def _peak_bytes(config: TransformerConfig, device: torch.device, precision: str, num_sequences: int) -> int:
    """Return the most bytes held at once, but for parameters and sparse gradients of tables."""
    # Tables' gradients have as many rows as the data makes them touch: a size that is a symbol here. The tensors are
    # those of a CPU, since torch makes none of a device that it was not built for.
    with FakeTensorMode(shape_env=ShapeEnv()):
        model = Transformer(config, sparse_tables=True)
        tokens = torch.zeros(num_sequences, config.context_length, dtype=torch.int64)
        with _LiveBytes() as live:
            with autocast(precision, torch.device("cpu")):
                if device.type == "cpu":
                    loss = model.loss(tokens, tokens)
                else:  # the logits are made whole
                    loss = F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
            torch.autograd.backward(loss)
    peak: int = live.peak
    return peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._sizes: dict[int, int] = {}
        self._now = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        if isinstance(size, int) and key not in self._sizes:
            self._sizes[key] = size
            self._now += size
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
