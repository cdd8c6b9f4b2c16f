"""What is timed: a layer with its optimisers, ours and those beside it, each taking the same steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, SparseAdam

from tinyexperts.bench.inputs import Inputs
from tinyexperts.layers import PEER, DenseFFN
from tinyexperts.ops.expert_mlp import reference as expert_reference
from tinyexperts.ops.expert_mlp.operator import _KERNELS as EXPERT_KERNELS
from tinyexperts.ops.product_key_topk import reference as topk_reference
from tinyexperts.ops.product_key_topk.operator import _KERNELS as TOPK_KERNELS
from tinyexperts.ops.row_adam.operator import _KERNELS as ADAM_KERNELS
from tinyexperts.optim import RowSparseAdam, deferred_gradients

QUERY_DIM = 128
_LEARNING_RATE = 1e-3


@dataclass(kw_only=True)
class Subject:
    """A layer x[M, D] -> y[M, D], the optimisers of its parameters, and the context in which it runs."""

    module: nn.Module
    optimizers: list[Optimizer]
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self, x_MD: Tensor) -> Tensor:
        """y [M, D], with its autograd graph where gradients are on."""
        with self.context():
            y_MD: Tensor = self.module(x_MD)
            return y_MD

    def step(self, x_MD: Tensor, grad_y_MD: Tensor) -> tuple[float, float, float]:
        """One training step; the seconds of its forward pass, its backward pass and its update."""
        with self.context():
            started = time.perf_counter()
            y_MD = self.module(x_MD)
            forward_done = time.perf_counter()
            with deferred_gradients(self.optimizers):
                y_MD.backward(grad_y_MD)
            backward_done = time.perf_counter()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            return forward_done - started, backward_done - forward_done, time.perf_counter() - backward_done

    def forward_of(self, inputs: Inputs) -> Callable[[], Tensor]:
        """`forward` of the next tokens, to be timed."""
        return lambda: self.forward(inputs.next())

    def step_of(self, inputs: Inputs) -> Callable[[], tuple[float, float, float]]:
        """`step` on the next tokens, which times itself."""
        return lambda: self.step(inputs.next(), inputs.grad_y_MD)

    def activation_bytes(self, x_MD: Tensor) -> int:
        """Bytes that a forward pass keeps for the backward pass: every storage once, the parameters' left out."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.module.parameters()}
        kept: dict[int, int] = {}
        x_MD = x_MD.detach().clone().requires_grad_()  # a storage of its own, and not a part of all inputs'

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y_MD = self.forward(x_MD)  # held, so that no storage is freed and its address used again
        del y_MD
        return sum(kept.values())


def make_layer(d_model: int, num_experts: int) -> PEER:
    """The paper's layer: 8 heads that retrieve 16 experts each, or all of a half's sub-keys where these are fewer."""
    num_sub_keys = round(num_experts**0.5)
    return PEER(
        d_model,
        num_experts,
        num_heads=8,
        experts_per_head=min(16, num_sub_keys),
        query_dim=QUERY_DIM,
        sparse=True,
    )


def our_subject(layer: PEER, second_moment: str) -> Subject:
    """The layer with the fused row Adam for its table and fused AdamW for the rest."""
    groups = layer.parameter_groups()
    table_optimizer = RowSparseAdam(groups.tables, lr=_LEARNING_RATE, second_moment=second_moment, fused=True)
    return Subject(module=layer, optimizers=[table_optimizer, AdamW(groups.dense, lr=_LEARNING_RATE, fused=True)])


def settle(subject: Subject, x_MD: Tensor, grad_y_MD: Tensor) -> None:
    """Take one step and write all of the optimisers' state, whose memory is else taken as rows are first touched."""
    subject.step(x_MD, grad_y_MD)
    for optimizer in subject.optimizers:
        for state in optimizer.state.values():
            for tensor in state.values():
                if tensor.dim():
                    tensor.zero_()


@contextmanager
def without_kernels() -> Iterator[None]:
    """The operators run in plain torch on the CPU too, as on a device without kernels."""
    tables: list[dict[str, Any]] = [EXPERT_KERNELS, TOPK_KERNELS, ADAM_KERNELS]
    kernels = [table.pop("cpu") for table in tables]
    try:
        yield
    finally:
        for table, kernel in zip(tables, kernels, strict=True):
            table["cpu"] = kernel


def reference_subject(ours: Subject) -> Subject:
    """Our layer with operators in plain torch, on the same table with the same state: it needs no memory of its own."""
    layer = ours.module
    assert isinstance(layer, PEER)
    table = nn.Parameter(layer.experts.detach())  # another parameter, so that this optimiser's state is its own
    twin = copy.deepcopy(layer, {id(layer.experts): table})
    table_optimizer = RowSparseAdam(
        [table], lr=_LEARNING_RATE, second_moment=ours.optimizers[0].defaults["second_moment"]
    )
    table_optimizer.state[table] = ours.optimizers[0].state[layer.experts]
    dense_optimizer = AdamW(twin.parameter_groups().dense, lr=_LEARNING_RATE, fused=True)
    return Subject(module=twin, optimizers=[table_optimizer, dense_optimizer], context=without_kernels)


class _Reference(nn.Module):
    """A PEER layer whose operators are their references: plain torch, open to torch.compile but for settling ties."""

    def __init__(self, layer: PEER) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_MD: Tensor) -> Tensor:
        router = self.layer.router
        scores, ids = topk_reference.product_key_topk(router.queries(x_MD), router.sub_keys, router.experts_per_head)
        weights = scores.softmax(-1)
        return expert_reference.expert_mlp(
            x_MD, self.layer.experts, ids.flatten(1), weights.flatten(1), self.layer.activation
        )[0]


def compiled_reference_subject(layer: PEER) -> Subject:
    """The references under torch.compile, on the same table, with fused Adam for all: autograd's gradient is dense."""
    torch.compiler.reset()  # sizes of settings before this one would be taken for dynamic ones
    table = nn.Parameter(layer.experts.detach())
    twin = copy.deepcopy(layer, {id(layer.experts): table})
    reference = _Reference(twin)
    reference.compile()
    return Subject(module=reference, optimizers=[Adam(twin.parameters(), lr=_LEARNING_RATE, fused=True)])


def dense_subject(d_model: int, hidden_dim: int) -> Subject:
    """A dense feed-forward layer with fused AdamW."""
    module = DenseFFN(d_model, hidden_dim)
    return Subject(module=module, optimizers=[AdamW(module.parameters(), lr=_LEARNING_RATE, fused=True)])


class _Tokens(nn.Module):
    """PEER-pytorch's layer takes sequences."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_MD: Tensor) -> Tensor:
        y_MD: Tensor = self.layer(x_MD[None])[0]
        return y_MD


def peer_pytorch_subject(layer: PEER, *, sparse: bool) -> Subject:
    """PEER-pytorch's layer of the same sizes: with fused Adam for all, or SparseAdam for its two embeddings.

    Raises:
        ImportError: PEER-pytorch is not installed; it is none of this project's dependencies.
    """
    from PEER_pytorch import PEER as TheirPEER  # noqa: N811

    num_experts, _, d_model = layer.experts.shape
    theirs = TheirPEER(
        d_model,
        heads=layer.router.num_heads,
        num_experts=num_experts,
        num_experts_per_head=layer.router.experts_per_head,
        non_competing_scores=False,
        dim_key=layer.router.query_dim // 2,
    )
    if not sparse:
        optimizers: list[Optimizer] = [Adam(theirs.parameters(), lr=_LEARNING_RATE, fused=True)]
    else:
        embeddings = [theirs.weight_down_embed, theirs.weight_up_embed]
        for embedding in embeddings:
            embedding.sparse = True
        tables = [embedding.weight for embedding in embeddings]
        rest = [parameter for name, parameter in theirs.named_parameters() if "_embed." not in name]
        optimizers = [SparseAdam(tables, lr=_LEARNING_RATE), Adam(rest, lr=_LEARNING_RATE, fused=True)]
    return Subject(module=_Tokens(theirs), optimizers=optimizers)
