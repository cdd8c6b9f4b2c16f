"""The operator tinyexperts::expert_mlp: the weighted sum of the experts a token retrieved, and its backward pass.

Saved for the backward pass: ids, weights and pre-activations, O(M (D + P)); never the gathered rows [M, P, E, D].
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor

from tinyexperts.errors import InputError
from tinyexperts.ops.activation import check_activation
from tinyexperts.ops.define_operator import define_operator
from tinyexperts.ops.devices import check_one_device
from tinyexperts.ops.expert_mlp import cpu, portable
from tinyexperts.ops.expert_mlp.deferred import defer_gradient, find_deferring_table
from tinyexperts.ops.expert_mlp.int4 import num_groups, packed_bytes
from tinyexperts.ops.expert_mlp.portable import accumulation_dtype
from tinyexperts.ops.expert_mlp.row_sums import sparse_gradient
from tinyexperts.ops.expert_mlp.table_gradient import TableGradient
from tinyexperts.ops.expert_mlp.table_gradient_gpu import GpuTableGradient
from tinyexperts.ops.forward_mode import refuse_forward_mode


def expert_mlp(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    *,
    scales: Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """Sum the retrieved experts of each token: y = sum over p of `weights[p] * e_ids[p](x)` (paper, section 2).

    Args:
        x_MD (float, [M, D]): the tokens.
        experts_NED (float or int8, [N, E, D], or uint8, [N, E, ceil(D / 2)]): the table. E = 1: values (v); E = 2:
            neurons (u, v); E = 3: gated (u, w, v). In uint8 it has 4 bits an element, as `quantize_groups` packs them.
        ids_MP (int64, [M, P]): the experts of each token, 0 <= id < N; one may repeat.
        weights_MP (float, [M, P]): their router weights.
        activation (str or None): "gelu", "relu", "relu2" or "silu"; None for E = 1, whose experts don't look at x,
            and only there.
        scales (float, [N, E] or [N, E, ceil(D / 32)]): the factor of each vector of an int8 table (`quantize_vectors`
            makes both), or of each group of a table in 4 bits (`quantize_groups`), and only there. It takes no
            gradient, and nor does its table.
        sparse (bool): give the table's gradient as a sparse_coo tensor of the touched rows, as
            nn.Embedding(sparse=True) does.

    Returns:
        y_MD (dtype of x, [M, D]): sums kept in fp32 (fp64 for fp64).

    Raises:
        InputError: shapes that don't fit each other, D = 0, operands on several devices, ids that are not int64, an
            unknown activation, an id outside 0..N - 1 (checked on the CPU; Triton's kernels check it with
            TRITON_DEBUG=1), an integer table without its scales or another with scales, a forward-mode derivative
            (torch.func.jvp).

    Differentiable once and in reverse mode only.
    """
    if experts_NED.dim() != 3 or not 1 <= experts_NED.shape[1] <= 3:
        raise InputError(f"experts must be [N, E, D] with E = 1, 2 or 3, got {list(experts_NED.shape)}")
    _check_width(x_MD, experts_NED)
    check_one_device("expert_mlp", x=x_MD, experts=experts_NED, ids=ids_MP, weights=weights_MP, scales=scales)
    if ids_MP.dim() != 2 or ids_MP.shape != weights_MP.shape or ids_MP.shape[0] != x_MD.shape[0]:
        raise InputError(
            f"ids and weights must be [M, P] with M = {x_MD.shape[0]}, "
            f"got {list(ids_MP.shape)} and {list(weights_MP.shape)}"
        )
    if ids_MP.dtype != torch.int64:
        raise InputError(f"ids must be int64, got {ids_MP.dtype}")
    if (experts_NED.shape[1] == 1) != (activation is None):
        raise InputError(
            f"activation is None for E = 1 and only there, got {activation!r} and E = {experts_NED.shape[1]}"
        )
    if activation is not None:
        check_activation(activation)
    _check_scales(x_MD, experts_NED, scales)
    refuse_forward_mode("expert_mlp", x_MD, experts_NED, weights_MP)
    y: Tensor = _expert_mlp(x_MD, experts_NED, ids_MP, weights_MP, activation, scales, sparse)[0]
    return y


def _check_width(x_MD: Tensor, experts_NED: Tensor) -> None:
    width = experts_NED.shape[2]
    if experts_NED.dtype == torch.uint8:
        if x_MD.dim() != 2 or packed_bytes(x_MD.shape[1]) != width:
            raise InputError(
                f"x must be [M, D] with D = {2 * width} or {2 * width - 1} for {width} bytes of 4 bits each, "
                f"got {list(x_MD.shape)}"
            )
    elif x_MD.dim() != 2 or x_MD.shape[1] != width:
        raise InputError(f"x must be [M, D] with D = {width}, got {list(x_MD.shape)}")
    if width == 0:
        raise InputError(f"D must be at least 1, got x {list(x_MD.shape)} and experts {list(experts_NED.shape)}")


def _check_scales(x_MD: Tensor, experts_NED: Tensor, scales: Tensor | None) -> None:
    dtype = experts_NED.dtype
    quantized = dtype in (torch.int8, torch.uint8)
    if not experts_NED.is_floating_point() and not quantized:
        raise InputError(f"experts must be of a floating-point type, int8 or uint8 (4 bits), got {dtype}")
    if quantized != (scales is not None):
        raise InputError(
            f"scales are for int8 and uint8 tables and only there, got {dtype} "
            f"{'without' if scales is None else 'with'} scales"
        )
    if scales is None:
        return
    shape, letters = list(experts_NED.shape[:2]), "[N, E]"
    if dtype == torch.uint8:
        shape, letters = [*shape, num_groups(x_MD.shape[1])], "[N, E, ceil(D / 32)]"
    if list(scales.shape) != shape or not scales.is_floating_point():
        raise InputError(f"scales must be floats {letters} = {shape}, got {scales.dtype} {list(scales.shape)}")


_GPU_KERNELS = "tinyexperts.ops.expert_mlp.gpu"

_expert_mlp = define_operator(
    "expert_mlp", portable.expert_mlp, cpu.expert_mlp, gpu_kernel=f"{_GPU_KERNELS}:EXPERT_MLP"
)


@_expert_mlp.register_fake
def _(
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    scales: Tensor | None,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    if sparse and experts_NED.requires_grad:
        _break_graph_before_sparse_gradient(experts_NED)
    shape = (experts_NED.shape[1] - 1, *ids_MP.shape)
    pre_activations = x_MD.new_empty(shape, dtype=accumulation_dtype(x_MD, experts_NED))
    return x_MD.new_empty(x_MD.shape), pre_activations


def _break_graph_before_sparse_gradient(experts_NED: Tensor) -> None:
    """Let torch.compile run the operator outside its graph, unless its graphs take a number of rows that data decide.

    They take it with fullgraph=True. Refused in the backward pass only, it would be an error of the compiler.
    """
    shape_env = experts_NED.fake_mode.shape_env if isinstance(experts_NED, FakeTensor) else None
    if shape_env is not None and not shape_env.allow_dynamic_output_shape_ops:
        raise DynamicOutputShapeException(torch.ops.tinyexperts.expert_mlp.default)


_expert_mlp_backward = define_operator(
    "expert_mlp_backward",
    portable.expert_mlp_backward,
    cpu.expert_mlp_backward,
    gpu_kernel=f"{_GPU_KERNELS}:EXPERT_MLP_BACKWARD",
)


@_expert_mlp_backward.register_fake
def _(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    experts_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    pre_activations_FMP: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    factors = pre_activations_FMP.new_empty((experts_NED.shape[1], *ids_MP.shape))
    return x_MD.new_empty(x_MD.shape), weights_MP.new_empty(weights_MP.shape), factors


# The number R of its rows depends on the data.
_gradient_rows = define_operator(
    "expert_mlp_gradient_rows",
    portable.gradient_rows,
    cpu.gradient_rows,
    gpu_kernel=f"{_GPU_KERNELS}_sums:GRADIENT_ROWS",
)


@_gradient_rows.register_fake
def _(
    ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor
) -> tuple[Tensor, Tensor]:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return ids_MP.new_empty((num_rows,)), experts_NED.new_empty((num_rows, *experts_NED.shape[1:]))


# An operator of its own, since torch.compile takes none whose output's shape depends on the data.
_dense_gradient = define_operator(
    "expert_mlp_dense_gradient",
    portable.dense_gradient,
    cpu.dense_gradient,
    gpu_kernel=f"{_GPU_KERNELS}_sums:DENSE_GRADIENT",
)


@_dense_gradient.register_fake
def _(ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor) -> Tensor:
    return experts_NED.new_empty(experts_NED.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_MD, experts_NED, ids_MP, weights_MP, ctx.activation, scales, ctx.sparse = inputs
    ctx.table = weakref.ref(experts_NED)  # activation checkpointing gives the backward pass another tensor for it
    ctx.save_for_backward(x_MD, experts_NED, ids_MP, weights_MP, output[1], scales)
    ctx.mark_non_differentiable(output[1])


def make_table_gradient(
    ctx: Any, ids_MP: Tensor, factors_EMP: Tensor, x_MD: Tensor, grad_y_MD: Tensor, experts_NED: Tensor
) -> Tensor | None:
    """Return the table's gradient, sparse or dense as `ctx` says; None where it is deferred."""
    if (table := find_deferring_table(ctx.table, factors_EMP.dtype, sparse=ctx.sparse)) is not None:
        operands = ids_MP, factors_EMP, x_MD, grad_y_MD
        on_cpu = table.device.type == "cpu"
        defer_gradient(table, TableGradient(*operands) if on_cpu else GpuTableGradient(*operands, table))
        return None
    if ctx.sparse:
        rows, grad_rows_RED = _gradient_rows(ids_MP, factors_EMP, x_MD, grad_y_MD, experts_NED)
        return sparse_gradient(rows, grad_rows_RED, experts_NED.shape)
    gradient: Tensor = _dense_gradient(ids_MP, factors_EMP, x_MD, grad_y_MD, experts_NED)
    return gradient


def _backward(ctx: Any, grad_y_MD: Tensor, _grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, scales = ctx.saved_tensors  # activation checkpointing lets them be unpacked once
    x_MD, experts_NED, ids_MP = saved[:3]
    grad_x, grad_weights, factors_EMP = _expert_mlp_backward(grad_y_MD, *saved, ctx.activation, scales)
    grad_experts = None
    if ctx.needs_input_grad[1]:
        grad_experts = make_table_gradient(ctx, ids_MP, factors_EMP, x_MD, grad_y_MD, experts_NED)
    return grad_x, grad_experts, None, grad_weights, None, None, None


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)
