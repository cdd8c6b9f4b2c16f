"""The check of the kernels against plain torch at the sizes that are measured: a fast wrong kernel is no result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers import PEER
from tinyexperts.ops import expert_mlp, product_key_topk
from tinyexperts.ops.expert_mlp import reference as expert_reference
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.ops.product_key_topk import portable as topk_portable
from tinyexperts.ops.row_adam import portable as adam_portable
from tinyexperts.optim import RowSparseAdam, deferred_gradients

TOLERANCE = 1e-4
MAX_TOKENS = 64


def check_kernels(layer: PEER, num_tokens: int, second_moments: Sequence[str], generator: torch.Generator) -> None:
    """Compare outputs, every gradient and the table's update, for at most 64 tokens.

    Args:
        layer (PEER): the layer whose sizes and table are taken.
        num_tokens (int): tokens of a batch M.
        second_moments (Sequence[str]): the kinds of updates.
        generator (torch.Generator): the source of randomness.

    Raises:
        InputError: names the first tensor that differs by more than 1e-4 of its largest element, and by how much.
    """
    num_tokens = min(num_tokens, MAX_TOKENS)
    num_experts, _, d_model = layer.experts.shape
    _check_retrieval(layer, num_tokens, generator)
    x_MD = torch.randn(num_tokens, d_model, generator=generator)
    shape = (num_tokens, layer.retrieved_per_token)
    # Every other expert is one of a few, so that rows sum the gradients of many pairs.
    ids_MP = torch.randint(num_experts, shape, generator=generator)
    ids_MP[:, ::2] %= 64
    weights_MP = torch.rand(shape, generator=generator)
    table = layer.experts.detach()
    check_experts(x_MD, table, ids_MP, weights_MP, layer.activation, generator)
    check_experts(x_MD, values_of(table), ids_MP, weights_MP, None, generator)
    for second_moment in second_moments:
        _check_update(x_MD, table, ids_MP, weights_MP, layer.activation, second_moment, generator)


def values_of(table_NED: Tensor) -> Tensor:
    """Return the first N vectors of a table as the table [N, 1, D] of a product-key memory, without a copy."""
    num_experts, _, d_model = table_NED.shape
    return table_NED.detach().view(-1, 1, d_model)[:num_experts]


def check_experts(
    x_MD: Tensor,
    table_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    generator: torch.Generator,
) -> None:
    """Compare the operator expert_mlp and its gradients.

    The reference works on the touched rows alone, so that its gradient is not as large as the table; in fp32, so that
    the gradient of a 16-bit table differs by its rounding, which is allowed.

    Args:
        x_MD (float32, [M, D]): the tokens.
        table_NED (float, [N, E, D]): the experts.
        ids_MP (int64, [M, P]): the retrieved experts.
        weights_MP (float32, [M, P]): their router weights.
        activation (str | None): the activation; None for values.
        generator (torch.Generator): the source of randomness.

    Raises:
        InputError: as `check_kernels`.
    """
    where = f"of {list(table_NED.shape)} experts in {str(table_NED.dtype).removeprefix('torch.')}"
    x, table, weights = (tensor.detach().requires_grad_() for tensor in (x_MD, table_NED, weights_MP))
    rows, positions_MP = ids_MP.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    compact = table_NED.detach()[rows].float().requires_grad_()
    grad_y = torch.randn(x_MD.shape, generator=generator)
    y = expert_mlp(x, table, ids_MP, weights, activation, sparse=True)
    expected_y, _ = expert_reference.expert_mlp(x, compact, positions_MP, weights, activation)
    _compare(f"output {where}", y, expected_y)
    grad_x, grad_table, grad_weights = torch.autograd.grad(y, (x, table, weights), grad_y)
    expected_x, expected_rows, expected_weights = torch.autograd.grad(
        expected_y, (x, compact, weights), grad_y, allow_unused=True, materialize_grads=True
    )
    _compare(f"gradient of x {where}", grad_x, expected_x)
    _compare(f"gradient of the router weights {where}", grad_weights, expected_weights)
    _compare(f"touched rows {where}", grad_table._indices()[0], rows)
    tolerance = max(TOLERANCE, torch.finfo(table_NED.dtype).eps if table_NED.dtype.itemsize == 2 else 0)
    _compare(f"gradient of the table {where}", grad_table._values(), expected_rows, tolerance)


def check_quantized_experts(
    x_MD: Tensor,
    table: Tensor,
    scales: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    generator: torch.Generator,
) -> None:
    """Compare the operator of a quantized table, and the gradients of the tokens and of the router weights.

    Args:
        x_MD (float32, [M, D]): the tokens.
        table (int8, [N, E, D], or uint8, [N, E, ceil(D / 2)]): the experts.
        scales (float, [N, E] or [N, E, ceil(D / 32)]): the scale of each vector or group.
        ids_MP (int64, [M, P]): the retrieved experts.
        weights_MP (float32, [M, P]): their router weights.
        activation (str | None): the activation; None for values.
        generator (torch.Generator): the source of randomness.

    Raises:
        InputError: as `check_kernels`.
    """
    where = f"of {len(table):,} experts in {'int8' if table.dtype == torch.int8 else '4 bits'}"
    rows, positions_MP = ids_MP.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    leaves = [tensor.detach().requires_grad_() for tensor in (x_MD, weights_MP)]
    grad_y = torch.randn(x_MD.shape, generator=generator)
    y = expert_mlp(leaves[0], table, ids_MP, leaves[1], activation, scales=scales)
    expected_y, _ = expert_reference.expert_mlp(
        leaves[0], table[rows], positions_MP, leaves[1], activation, scales[rows]
    )
    _compare(f"output {where}", y, expected_y)
    gradients, expected = (
        torch.autograd.grad(each, leaves, grad_y, allow_unused=True, materialize_grads=True) for each in (y, expected_y)
    )
    _compare(f"gradient of x {where}", gradients[0], expected[0])
    _compare(f"gradient of the router weights {where}", gradients[1], expected[1])


def _check_update(
    x_MD: Tensor,
    table_NED: Tensor,
    ids_MP: Tensor,
    weights_MP: Tensor,
    activation: str | None,
    second_moment: str,
    generator: torch.Generator,
) -> None:
    """Compare the fused step, in which each row's gradient is summed where it is used."""
    where = f"in the fused step (second moment a {second_moment}) of {list(table_NED.shape)} experts"
    rows, positions_MP = ids_MP.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    table = nn.Parameter(table_NED[rows])
    compact = table_NED[rows].requires_grad_()
    optimizer = RowSparseAdam([table], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, second_moment=second_moment, fused=True)
    grad_y = torch.randn(x_MD.shape, generator=generator)
    with deferred_gradients([optimizer]):
        expert_mlp(x_MD, table, positions_MP, weights_MP, activation, sparse=True).backward(grad_y)  # type: ignore[no-untyped-call]
    expected_y, _ = expert_reference.expert_mlp(x_MD, compact, positions_MP, weights_MP, activation)
    (expected_gradient,) = torch.autograd.grad(expected_y, compact, grad_y)
    assert table.grad is not None
    pending = pending_gradient(table.grad)
    assert pending is not None
    touched, gradient = pending.rows_and_values()
    _compare(f"touched rows {where}", touched, torch.arange(len(rows)))
    _compare(f"gradient of the table {where}", gradient, expected_gradient)
    optimizer.step()
    # From the gradient just compared: where one is almost zero rounding decides its sign, which is Adam's first step.
    expected = compact.detach().clone()
    first = torch.zeros_like(expected)
    second = torch.zeros_like(expected[..., 0] if second_moment == "row" else expected)
    adam_portable.row_adam_(expected, first, second, touched, gradient, 1e-3, 0.9, 0.99, 1e-8, 0.0, 1)
    _compare(f"table {where}", table, expected)
    _compare(f"first moment {where}", optimizer.state[table]["exp_avg"], first)
    _compare(f"second moment {where}", optimizer.state[table]["exp_avg_sq"], second)


def _check_retrieval(layer: PEER, num_tokens: int, generator: torch.Generator) -> None:
    """Compare the retrieval for random queries, whose components have the variance 1 that batch norm gives them."""
    router = layer.router
    where = f"of the retrieval from N = {len(layer.experts)}"
    query = torch.randn(num_tokens, router.num_heads, router.query_dim, generator=generator).requires_grad_()
    sub_keys = router.sub_keys.detach().requires_grad_()
    scores, ids = product_key_topk(query, sub_keys, router.experts_per_head)
    expected, _ = topk_portable.product_key_topk(query.detach(), sub_keys.detach(), router.experts_per_head)
    _compare(f"scores {where}", scores, expected)
    # Other rounding may swap experts of almost equal scores, so ids are compared by what they score.
    halves = topk_portable.half_scores(query.detach(), sub_keys.detach())
    first, second = ids // router.num_sub_keys, ids % router.num_sub_keys
    _compare(f"ids (by their scores) {where}", halves[0].gather(2, first) + halves[1].gather(2, second), expected)
    grad_scores = torch.randn(scores.shape, generator=generator)
    grad_query, grad_keys = torch.autograd.grad(scores, (query, sub_keys), grad_scores)
    expected_query, expected_keys = topk_portable.product_key_topk_backward(
        grad_scores, ids, query.detach(), sub_keys.detach()
    )
    _compare(f"gradient of the queries {where}", grad_query, expected_query)
    _compare(f"gradient of the sub-keys {where}", grad_keys, expected_keys)


@torch.no_grad()
def _compare(name: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    difference = float("inf")
    if actual.shape == expected.shape:
        largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((actual - expected).abs().max() / largest)
    if not difference <= tolerance:  # NaN too
        raise InputError(
            f"nothing is reported: the kernels' {name} differs from the reference by {difference:.2g} of its largest "
            f"element, more than {tolerance:g}"
        )
