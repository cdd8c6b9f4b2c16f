"""The layers that are timed, ours and its baselines: each with its optimizers, all taking the same steps."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, SparseAdam

from tinyexperts.bench.inputs import Inputs
from tinyexperts.layers import PEER, DenseFFN
from tinyexperts.ops.expert_mlp import reference as expert_reference
from tinyexperts.ops.product_key_topk import portable as topk_portable
from tinyexperts.ops.without_kernels import without_kernels
from tinyexperts.optim import RowSparseAdam, deferred_gradients

_LEARNING_RATE = 1e-3


@dataclass(kw_only=True)
class Contestant:
    """A layer x[M, D] -> y[M, D], the optimizers of its parameters, and the context in which it runs."""

    module: nn.Module
    optimizers: list[Optimizer]
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self, x_MD: Tensor) -> Tensor:
        """Return y [M, D], with its autograd graph where gradients are on."""
        with self.context():
            y_MD: Tensor = self.module(x_MD)
            return y_MD

    def step(self, x_MD: Tensor, grad_y_MD: Tensor) -> tuple[float, float, float]:
        """Take a training step.

        Args:
            x_MD (float32, [M, D]): the tokens.
            grad_y_MD (float32, [M, D]): the gradient of the output.

        Returns:
            The seconds of the forward pass, the backward pass and the update.
        """
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
        """Return a call of `forward` on the next tokens, to be timed."""
        return lambda: self.forward(inputs.next())

    def step_of(self, inputs: Inputs) -> Callable[[], tuple[float, float, float]]:
        """Return a call of `step` on the next tokens, which times itself."""
        return lambda: self.step(inputs.next(), inputs.grad_y_MD)

    def activation_bytes(self, x_MD: Tensor) -> int:
        """Return the bytes that a forward pass keeps for the backward pass: each storage once, no parameters.

        Args:
            x_MD (float32, [M, D]): the tokens.
        """
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


@dataclass(kw_only=True)
class OurLayer(Contestant):
    """Our layer; the first of its optimizers is that of its table."""

    module: PEER


def make_layer(d_model: int, num_experts: int) -> PEER:
    """Make the paper's layer: 8 heads that retrieve 16 experts each, or fewer where a half has fewer sub-keys."""
    num_sub_keys = round(num_experts**0.5)
    return PEER(d_model, num_experts, experts_per_head=min(16, num_sub_keys), sparse=True)


def our_layer(layer: PEER, second_moment: str) -> OurLayer:
    """Return the layer with the fused row Adam for its table and fused AdamW for the rest."""
    groups = layer.parameter_groups()
    table_optimizer = RowSparseAdam(groups.tables, lr=_LEARNING_RATE, second_moment=second_moment, fused=True)
    return OurLayer(module=layer, optimizers=[table_optimizer, AdamW(groups.dense, lr=_LEARNING_RATE, fused=True)])


def settle(contestant: Contestant, x_MD: Tensor, grad_y_MD: Tensor) -> None:
    """Take a step, then write all of the optimizers' state, so that no later step waits for its memory.

    Args:
        contestant (Contestant): the layer.
        x_MD (float32, [M, D]): its tokens.
        grad_y_MD (float32, [M, D]): the gradient of its output.
    """
    contestant.step(x_MD, grad_y_MD)
    for optimizer in contestant.optimizers:
        for state in optimizer.state.values():
            for tensor in state.values():
                if tensor.dim():
                    tensor.zero_()


def reference(ours: OurLayer) -> Contestant:
    """Return our layer with operators in plain torch, on the same table with the same state: it takes no memory."""
    layer = ours.module
    table = nn.Parameter(layer.experts.detach())  # another parameter, so that this optimizer's state is its own
    twin = copy.deepcopy(layer, {id(layer.experts): table})
    table_optimizer = RowSparseAdam(
        [table], lr=_LEARNING_RATE, second_moment=ours.optimizers[0].defaults["second_moment"]
    )
    table_optimizer.state[table] = ours.optimizers[0].state[layer.experts]
    dense_optimizer = AdamW(twin.parameter_groups().dense, lr=_LEARNING_RATE, fused=True)
    return Contestant(module=twin, optimizers=[table_optimizer, dense_optimizer], context=without_kernels)


class _Reference(nn.Module):
    """A PEER layer of operators in plain torch, open to torch.compile except for settling ties."""

    def __init__(self, layer: PEER) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_MD: Tensor) -> Tensor:
        router = self.layer.router
        scores, ids = topk_portable.product_key_topk(router.queries(x_MD), router.sub_keys, router.experts_per_head)
        weights = scores.softmax(-1)
        return expert_reference.expert_mlp(
            x_MD, self.layer.experts, ids.flatten(1), weights.flatten(1), self.layer.activation
        )[0]


def compiled_reference(layer: PEER) -> Contestant:
    """Return plain torch under torch.compile, on the same table, with fused Adam: autograd's gradient is dense."""
    torch.compiler.reset()  # sizes of settings before this one would be taken for dynamic ones
    table = nn.Parameter(layer.experts.detach())
    twin = copy.deepcopy(layer, {id(layer.experts): table})
    module = _Reference(twin)
    module.compile()
    return Contestant(module=module, optimizers=[Adam(twin.parameters(), lr=_LEARNING_RATE, fused=True)])


def dense(d_model: int, hidden_dim: int) -> Contestant:
    """Return a dense feed-forward layer with fused AdamW."""
    module = DenseFFN(d_model, hidden_dim)
    return Contestant(module=module, optimizers=[AdamW(module.parameters(), lr=_LEARNING_RATE, fused=True)])


class _Tokens(nn.Module):
    """A layer of tokens [M, D] from one of sequences [B, T, D], as PEER-pytorch's is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_MD: Tensor) -> Tensor:
        y_MD: Tensor = self.layer(x_MD[None])[0]
        return y_MD


def peer_pytorch(layer: PEER, *, sparse: bool) -> Contestant:
    """Return PEER-pytorch's layer of the same sizes.

    Args:
        layer (PEER): our layer.
        sparse (bool): take SparseAdam for its two embeddings; otherwise fused Adam for all.

    Raises:
        ImportError: PEER-pytorch is not installed; no extra but dev brings it.
    """
    TheirPEER = importlib.import_module("PEER_pytorch").PEER

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
    return Contestant(module=_Tokens(theirs), optimizers=optimizers)
