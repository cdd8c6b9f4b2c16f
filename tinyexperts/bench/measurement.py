"""One setting measured: the experts' operator beside the machine's limit, the layer in parts, and its rivals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.bench import memory, random_row_limit
from tinyexperts.bench.inputs import Inputs, pool_size
from tinyexperts.bench.kernel_check import check_kernels, values_of
from tinyexperts.bench.rivals import RIVALS, RivalName, measure_rival
from tinyexperts.bench.subjects import Subject, our_subject, settle, without_kernels
from tinyexperts.bench.timing import interleaved, phases_of_step, spread, timed, timed_after
from tinyexperts.layers import PEER
from tinyexperts.ops import expert_mlp, product_key_topk

SECOND_MOMENTS = ("element", "row")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_ids(kind: str, num_experts: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ids (int64): "uniform", or "zipf": the r-th most frequent expert with probability in proportion to 1 / r."""
    if kind == "uniform":
        return torch.randint(num_experts, shape, generator=generator)
    cumulative = (1 / torch.arange(1, num_experts + 1, dtype=torch.float64)).cumsum(0)
    ranks = torch.searchsorted(cumulative, torch.rand(shape, generator=generator, dtype=torch.float64) * cumulative[-1])
    # The frequent ones lie anywhere in the table.
    return torch.randperm(num_experts, generator=generator)[ranks.clamp(max=num_experts - 1)]


def measure_operator(
    layer: PEER, kind: str, num_tokens: int, *, repeats: int, generator: torch.Generator
) -> dict[str, Any]:
    """The experts' forward pass alone, with ids of the given kind, beside reads of the same rows.

    Returns seconds, what must move (`bytes`, the retrieved rows) and be computed (`flops`), rates (1e9 a second), the
    share of the limit, and ratios to the reference in plain torch and, for tables of values, to F.embedding_bag.
    """
    table = layer.experts.detach()
    num_experts, num_vectors, d_model = table.shape
    shape = (pool_size(num_tokens), num_tokens, layer.retrieved_per_token)
    ids = draw_ids(kind, num_experts, shape, generator)
    x = torch.randn(*shape[:2], d_model, generator=generator)
    weights = torch.rand(shape, generator=generator)
    batches = cycle([(*batch, batch[1].flatten().numpy()) for batch in zip(x, ids, weights, strict=True)])
    words, values = random_row_limit.words_of(table), values_of(table)

    def read(variant: random_row_limit.Variant) -> None:
        random_row_limit.read_rows(words, next(batches)[3], variant)

    def experts(table_NED: Tensor, activation: str | None) -> Tensor:
        x_MD, ids_MP, weights_MP, _ = next(batches)
        return expert_mlp(x_MD, table_NED, ids_MP, weights_MP, activation)

    def reference() -> Tensor:
        with without_kernels():
            return experts(table, layer.activation)

    def embedding_bag() -> Tensor:
        _, ids_MP, weights_MP, _ = next(batches)
        return F.embedding_bag(ids_MP, values[:, 0], mode="sum", per_sample_weights=weights_MP)

    variants = {str(variant): timed(_call(read, variant)) for variant in random_row_limit.VARIANTS}
    with torch.no_grad():
        times = interleaved(
            {
                **variants,
                "experts": timed(_call(experts, table, layer.activation)),
                "reference": timed(reference),
                "values": timed(_call(experts, values, None)),
                "embedding_bag": timed(embedding_bag),
            },
            repeats,
        )
    seconds = {name: rounds[:, 0] for name, rounds in times.items()}
    best = min(variants, key=lambda variant: float(np.median(seconds[variant])))
    num_pairs = num_tokens * layer.retrieved_per_token
    num_bytes = num_pairs * table[0].numel() * table.element_size()
    flops = 2 * num_pairs * num_vectors * d_model
    return {
        "bytes": num_bytes,
        "flops": flops,
        "limit_variant": best,
        "limit_gb_per_second": _rate(num_bytes, seconds[best]),
        "limit_gb_per_second_by_variant": {variant: _rate(num_bytes, seconds[variant]) for variant in variants},
        "forward_seconds": spread(seconds["experts"]),
        "gb_per_second": _rate(num_bytes, seconds["experts"]),
        "gflop_per_second": _rate(flops, seconds["experts"]),
        "share_of_limit": spread(seconds[best] / seconds["experts"]),
        "reference_forward_seconds": spread(seconds["reference"]),
        "reference_forward_ratio": spread(seconds["reference"] / seconds["experts"]),
        "values_forward_seconds": spread(seconds["values"]),
        "embedding_bag_forward_seconds": spread(seconds["embedding_bag"]),
        "embedding_bag_forward_ratio": spread(seconds["embedding_bag"] / seconds["values"]),
    }


def measure_setting(
    layer: PEER,
    *,
    num_tokens: int,
    threads: int,
    ids: Collection[str],
    repeats: int,
    max_bytes: float,
    rivals: Collection[RivalName] = tuple(RIVALS),
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Everything about one setting, as JSON wants it; M = 1 in evaluation without gradients, M > 1 in training.

    layer: as `make_layer` makes it
    ids: kinds of ids of the operator alone; a layer's own are those that its router chooses
    max_bytes: of tables, gradients and optimisers' state at a time; what needs more is left out, and `left_out` says so
    rivals: which of RIVALS to measure
    on_stage: is told what is being measured

    Raises:
        InputError: a kernel differs from the reference.
    """
    num_experts, _, d_model = layer.experts.shape
    table = memory.table_bytes(d_model, num_experts)
    moments = [moment for moment in SECOND_MOMENTS if memory.needed_bytes(moment, table) <= max_bytes]
    trains = num_tokens > 1
    generator = torch.Generator().manual_seed(0)
    left_out = []
    if trains and len(moments) < len(SECOND_MOMENTS):
        needed = memory.gib(memory.needed_bytes("element", table))
        left_out.append(f"the step with a second moment an element: it needs {needed}")
    with torch_threads(threads), torch.set_grad_enabled(trains):
        on_stage("checking the kernels")
        with torch.enable_grad():
            check_kernels(layer, num_tokens, SECOND_MOMENTS, generator)
        memory.restart_peak()
        operator = {}
        for kind in ids:
            on_stage(f"experts, {kind} ids")
            operator[kind] = measure_operator(layer, kind, num_tokens, repeats=repeats, generator=generator)
        on_stage("layer")
        inputs = Inputs(num_tokens, d_model, trains=trains, generator=generator)
        layer.train(trains)
        # The moment that is kept for the rivals comes last.
        ours, measured = _measure_ours(layer, inputs, moments[::-1] if trains else (), repeats=repeats)
        measured["peak_resident_bytes"] = memory.peak_resident_bytes()
        beside = {}
        for name in rivals:
            rival = RIVALS[name]
            if rival.only_trained and not trains:
                continue
            on_stage(rival.label)
            result, reason = measure_rival(rival, ours, inputs, repeats=repeats, max_bytes=max_bytes)
            gc.collect()
            if result is not None:
                beside[name] = result
            if reason is not None:
                left_out.append(f"{rival.label}: {reason}")
    return {
        "d_model": d_model,
        "num_experts": num_experts,
        "num_tokens": num_tokens,
        "threads": threads,
        "num_heads": layer.router.num_heads,
        "experts_per_head": layer.router.experts_per_head,
        "operator": operator,
        "layer": measured,
        "rivals": beside,
        "left_out": left_out,
    }


def _measure_ours(
    layer: PEER, inputs: Inputs, second_moments: Sequence[str], *, repeats: int
) -> tuple[Subject, dict[str, Any]]:
    """The layer, its parts and its training steps; and the layer with the state of the last second moment."""
    num_tokens, d_model = inputs.grad_y_MD.shape
    num_vectors = layer.experts.shape[1]
    flops = layer.flops_per_token()
    ours = our_subject(layer, "element")
    steps, step_bytes = {}, {}
    with torch.no_grad():
        touched = layer.route(inputs.next()).ids.unique().numel()
    row_bytes, moment_bytes = num_vectors * d_model * 4, {"element": num_vectors * d_model * 4, "row": num_vectors * 4}
    expert_bytes = num_tokens * layer.retrieved_per_token * row_bytes
    for moment in second_moments:
        del ours  # and its state, before another takes as much
        ours = our_subject(layer, moment)
        settle(ours, inputs.next(), inputs.grad_y_MD)
        phases = interleaved({"ours": ours.step_of(inputs)}, repeats)["ours"]
        steps[moment] = phases_of_step(phases)
        # Both passes read the retrieved rows; the update reads and writes the touched ones and both of their moments.
        step_bytes[moment] = 2 * expert_bytes + 2 * touched * (2 * row_bytes + moment_bytes[moment])
    router = layer.router

    def queries() -> Tensor:
        return router.queries(inputs.next()).detach()

    def routed() -> tuple[Tensor, Tensor, Tensor]:
        x_MD = inputs.next()
        routing = layer.route(x_MD)
        return x_MD, routing.ids.flatten(1), routing.weights.detach().flatten(1)

    def experts(prepared: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x_MD, ids_MP, weights_MP = prepared
        return expert_mlp(x_MD, layer.experts, ids_MP, weights_MP, layer.activation, sparse=layer.sparse)

    times = interleaved(
        {
            "router": timed(lambda: layer.route(inputs.next())),
            "topk": timed_after(
                queries, lambda query_MHQ: product_key_topk(query_MHQ, router.sub_keys, router.experts_per_head)
            ),
            "experts": timed_after(routed, experts),
            "layer": timed(lambda: ours.forward(inputs.next())),
        },
        repeats,
    )
    shares = {name: spread(times[name][:, 0] / times["layer"][:, 0]) for name in ("router", "topk", "experts")}
    return ours, {
        "router_forward_seconds": spread(times["router"][:, 0]),
        "topk_forward_seconds": spread(times["topk"][:, 0]),
        "experts_forward_seconds": spread(times["experts"][:, 0]),
        "forward_seconds": spread(times["layer"][:, 0]),
        "forward_shares": shares,
        "forward_flops": num_tokens * flops.total,
        "forward_gflop_per_second": _rate(num_tokens * flops.total, times["layer"][:, 0]),
        "touched_rows": touched,
        "steps": steps,
        "step_bytes": step_bytes,
        "step_flops": 3 * num_tokens * flops.total,
        "activation_bytes_per_token": ours.activation_bytes(inputs.next()) / num_tokens if second_moments else None,
    }


def _call(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _rate(amount: float, seconds: np.ndarray) -> float:
    """Billions (1e9) a second, by the median of the seconds."""
    return amount / float(np.median(seconds)) / 1e9
