"""The layer as a whole and in parts: its router, its experts, and its training steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyexperts.bench import memory
from tinyexperts.bench.contestants import OurLayer, our_layer, settle
from tinyexperts.bench.inputs import Inputs
from tinyexperts.bench.timing import Spread, StepTimes, billions_per_second, interleaved, timed, timed_after
from tinyexperts.layers import PEER
from tinyexperts.ops import expert_mlp, product_key_topk


@dataclass(frozen=True, kw_only=True)
class LayerMeasurement:
    """The layer's forward pass, its parts, and its training steps."""

    router_forward_seconds: Spread
    topk_forward_seconds: Spread
    """The seconds of the top-k of product keys, a part of the router's."""
    experts_forward_seconds: Spread
    forward_seconds: Spread
    forward_shares: dict[str, Spread]
    """The shares of router, topk and experts in the forward pass, round by round."""
    forward_flops: int
    forward_gflop_per_second: float
    touched_rows: int
    """The experts that a batch retrieves, each counted once."""
    steps: dict[str, StepTimes]
    """The training steps by the kind of second moment; empty where nothing is trained."""
    step_bytes: dict[str, int]
    """The bytes that a step must move."""
    step_flops: int
    activation_bytes_per_token: float | None
    """The bytes that the forward pass keeps for the backward pass; None where nothing is trained."""
    peak_resident_bytes: int | None
    """The most memory that the process held; None where the system doesn't say."""


def measure_layer(
    layer: PEER, inputs: Inputs, second_moments: Sequence[str], *, repeats: int
) -> tuple[OurLayer, LayerMeasurement]:
    """Measure the layer, its parts and its training steps.

    Args:
        layer (PEER): a layer of `make_layer`.
        inputs (Inputs): its tokens.
        second_moments (Sequence[str]): the kinds of training steps; none: nothing is trained.
        repeats (int): rounds that a median is taken over.

    Returns:
        The layer with the state of the last second moment, and the measurement.
    """
    num_tokens, d_model = inputs.grad_y_MD.shape
    num_vectors = layer.experts.shape[1]
    flops = layer.flops_per_token()
    ours = our_layer(layer, "element")
    steps, step_bytes = {}, {}
    with torch.no_grad():
        touched = layer.route(inputs.next()).ids.unique().numel()  # type: ignore[no-untyped-call]
    row_bytes, moment_bytes = num_vectors * d_model * 4, {"element": num_vectors * d_model * 4, "row": num_vectors * 4}
    expert_bytes = num_tokens * layer.retrieved_per_token * row_bytes
    for moment in second_moments:
        del ours  # and its state, before another takes as much
        ours = our_layer(layer, moment)
        settle(ours, inputs.next(), inputs.grad_y_MD)
        steps[moment] = StepTimes.of(interleaved({"ours": ours.step_of(inputs)}, repeats)["ours"])
        # Both passes read the retrieved rows; the update reads and writes the touched ones and both of their moments.
        step_bytes[moment] = 2 * expert_bytes + 2 * touched * (2 * row_bytes + moment_bytes[moment])
    seconds = _forward_seconds(ours, inputs, repeats)
    return ours, LayerMeasurement(
        router_forward_seconds=Spread.of(seconds["router"]),
        topk_forward_seconds=Spread.of(seconds["topk"]),
        experts_forward_seconds=Spread.of(seconds["experts"]),
        forward_seconds=Spread.of(seconds["layer"]),
        forward_shares={part: Spread.of(seconds[part] / seconds["layer"]) for part in ("router", "topk", "experts")},
        forward_flops=num_tokens * flops.total,
        forward_gflop_per_second=billions_per_second(num_tokens * flops.total, seconds["layer"]),
        touched_rows=touched,
        steps=steps,
        step_bytes=step_bytes,
        step_flops=3 * num_tokens * flops.total,
        activation_bytes_per_token=ours.activation_bytes(inputs.next()) / num_tokens if second_moments else None,
        peak_resident_bytes=memory.peak_resident_bytes(),
    )


def _forward_seconds(ours: OurLayer, inputs: Inputs, repeats: int) -> dict[str, np.ndarray]:
    """Time the forward pass and its parts in turns, each part on what the parts before it computed."""
    layer, router = ours.module, ours.module.router

    def queries() -> Tensor:
        return router.queries(inputs.next()).detach()

    def topk(query_MHQ: Tensor) -> object:
        return product_key_topk(query_MHQ, router.sub_keys, router.experts_per_head)

    def routed() -> tuple[Tensor, Tensor, Tensor]:
        x_MD = inputs.next()
        routing = layer.route(x_MD)
        return x_MD, routing.ids.flatten(1), routing.weights.detach().flatten(1)

    def experts(prepared: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x_MD, ids_MP, weights_MP = prepared
        return expert_mlp(x_MD, layer.experts, ids_MP, weights_MP, layer.activation, sparse=layer.sparse)

    calls = {
        "router": timed(lambda: layer.route(inputs.next())),
        "topk": timed_after(queries, topk),
        "experts": timed_after(routed, experts),
        "layer": timed(ours.forward_of(inputs)),
    }
    return {name: rounds[:, 0] for name, rounds in interleaved(calls, repeats).items()}
