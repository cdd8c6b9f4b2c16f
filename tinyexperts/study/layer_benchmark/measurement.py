"""One setting measured: the experts' operator beside the machine's limit, the layer in parts, and its rivals."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.layers import PEER, DenseFFN
from tinyexperts.ops import expert_mlp, product_key_topk
from tinyexperts.study.layer_benchmark import memory, random_row_limit
from tinyexperts.study.layer_benchmark.kernel_check import check_kernels, values_of
from tinyexperts.study.layer_benchmark.subjects import (
    Subject,
    compiled_reference_subject,
    dense_subject,
    our_subject,
    peer_pytorch_subject,
    reference_subject,
    settle,
    without_kernels,
)
from tinyexperts.study.layer_benchmark.timing import Spread, interleaved, timed, timed_after

SECOND_MOMENTS = ("element", "row")
RivalName = Literal[
    "reference",
    "compiled_reference",
    "dense_equal_width",
    "dense_equal_time",
    "peer_pytorch_adam",
    "peer_pytorch_sparse_adam",
]
RIVALS: dict[RivalName, str] = {
    "reference": "operators in plain torch",
    "compiled_reference": "reference, torch.compile",
    "dense_equal_width": "dense, equal width",
    "dense_equal_time": "dense, equal time",
    "peer_pytorch_adam": "PEER-pytorch, Adam",
    "peer_pytorch_sparse_adam": "PEER-pytorch, SparseAdam",
}
# Batches that follow each other, so that the rows of one are no longer in the cache when it comes again.
_MIN_POOL_TOKENS = 2048
_MIN_POOL = 3
# Equal time is looked for among multiples of this, up to this.
_HIDDEN_STEP, _MAX_HIDDEN = 16, 1 << 16
_SEARCH_REPEATS = 3


class Inputs:
    """Random tokens in turn, each batch [M, D] of standard normal numbers, and a gradient of the output.

    In training the tokens want a gradient, as those of a layer within a model do.
    """

    def __init__(self, num_tokens: int, d_model: int, *, trains: bool, generator: torch.Generator) -> None:
        self._trains = trains
        self._x_MD = cycle(torch.randn(pool_size(num_tokens), num_tokens, d_model, generator=generator).unbind())
        self.grad_y_MD = torch.randn(num_tokens, d_model, generator=generator)

    def next(self) -> Tensor:
        return next(self._x_MD).detach().requires_grad_(self._trains)


def pool_size(num_tokens: int) -> int:
    """Batches of a pool: odd, so that calls that take turns get each of them."""
    return max(_MIN_POOL, _MIN_POOL_TOKENS // num_tokens + 1 | 1)


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
        "forward_seconds": _spread(seconds["experts"]),
        "gb_per_second": _rate(num_bytes, seconds["experts"]),
        "gflop_per_second": _rate(flops, seconds["experts"]),
        "share_of_limit": _spread(seconds[best] / seconds["experts"]),
        "reference_forward_seconds": _spread(seconds["reference"]),
        "reference_forward_ratio": _spread(seconds["reference"] / seconds["experts"]),
        "values_forward_seconds": _spread(seconds["values"]),
        "embedding_bag_forward_seconds": _spread(seconds["embedding_bag"]),
        "embedding_bag_forward_ratio": _spread(seconds["embedding_bag"] / seconds["values"]),
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
        for rival in rivals:
            if rival == "peer_pytorch_sparse_adam" and not trains:
                continue
            on_stage(RIVALS[rival])
            result, reason = _measure_rival(rival, ours, inputs, repeats=repeats, max_bytes=max_bytes, trains=trains)
            gc.collect()
            if result is not None:
                beside[rival] = result
            if reason is not None:
                left_out.append(f"{RIVALS[rival]}: {reason}")
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
        phases = interleaved({"ours": _step_of(ours, inputs)}, repeats)["ours"]
        steps[moment] = _phases(phases)
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
    shares = {name: _spread(times[name][:, 0] / times["layer"][:, 0]) for name in ("router", "topk", "experts")}
    return ours, {
        "router_forward_seconds": _spread(times["router"][:, 0]),
        "topk_forward_seconds": _spread(times["topk"][:, 0]),
        "experts_forward_seconds": _spread(times["experts"][:, 0]),
        "forward_seconds": _spread(times["layer"][:, 0]),
        "forward_shares": shares,
        "forward_flops": num_tokens * flops.total,
        "forward_gflop_per_second": _rate(num_tokens * flops.total, times["layer"][:, 0]),
        "touched_rows": touched,
        "steps": steps,
        "step_bytes": step_bytes,
        "step_flops": 3 * num_tokens * flops.total,
        "activation_bytes_per_token": ours.activation_bytes(inputs.next()) / num_tokens if second_moments else None,
    }


def _measure_rival(
    rival: RivalName, ours: Subject, inputs: Inputs, *, repeats: int, max_bytes: float, trains: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """A rival in turns with our layer, and why it or its training step is left out, where it is.

    Ratios are its time over ours, round by round; ours is that of the same rounds, and not of when it ran alone.
    """
    layer = ours.module
    assert isinstance(layer, PEER)
    d_model = layer.experts.shape[2]
    if rival.startswith("peer_pytorch") and importlib.util.find_spec("PEER_pytorch") is None:
        return None, "not installed (pip install PEER-pytorch)"
    forward_bytes, step_bytes = _rival_bytes(rival, ours, inputs)
    reason = None
    if forward_bytes > max_bytes:
        return None, f"it needs {memory.gib(forward_bytes)} beside ours"
    if trains and step_bytes > max_bytes:
        reason = f"the training step needs {memory.gib(step_bytes)} beside ours"
    with_steps = trains and reason is None
    make: dict[str, Callable[[], Subject]] = {
        "reference": lambda: reference_subject(ours),
        "compiled_reference": lambda: compiled_reference_subject(layer),
        "dense_equal_width": lambda: dense_subject(d_model, layer.retrieved_per_token),
        "dense_equal_time": lambda: dense_subject(d_model, _hidden_dim_of_equal_time(ours, inputs, trains)),
        "peer_pytorch_adam": lambda: peer_pytorch_subject(layer, sparse=False),
        "peer_pytorch_sparse_adam": lambda: peer_pytorch_subject(layer, sparse=True),
    }
    subject = make[rival]()
    subject.module.train(trains)
    if rival == "compiled_reference":
        try:
            subject.forward(inputs.next())
        except RuntimeError as error:  # torch's compiler wants one for C++, which not every machine has
            return None, f"torch.compile failed ({str(error).strip().splitlines()[0]})"
    result: dict[str, Any] = {}
    if isinstance(subject.module, DenseFFN):
        result["hidden_dim"] = subject.module.up.out_features
    pair = {"ours": ours, "rival": subject}
    times = interleaved({name: timed(_call(_forward, one, inputs)) for name, one in pair.items()}, repeats)
    result["forward_seconds"] = _spread(times["rival"][:, 0])
    result["our_forward_seconds"] = _spread(times["ours"][:, 0])
    result["forward_ratio"] = _spread(times["rival"][:, 0] / times["ours"][:, 0])
    if with_steps:
        times = interleaved({name: _step_of(one, inputs) for name, one in pair.items()}, repeats)
        result["step"] = _phases(times["rival"])
        result["our_step"] = _phases(times["ours"])
        result["step_ratio"] = _spread(times["rival"].sum(1) / times["ours"].sum(1))
        result["activation_bytes_per_token"] = subject.activation_bytes(inputs.next()) / len(inputs.grad_y_MD)
    return result, reason


def _rival_bytes(rival: str, ours: Subject, inputs: Inputs) -> tuple[int, int]:
    """Memory that a forward pass and a training step of a rival need beside ours: a little above what was measured."""
    layer = ours.module
    assert isinstance(layer, PEER)
    num_experts, _, d_model = layer.experts.shape
    table = memory.table_bytes(d_model, num_experts)
    num_pairs = len(inputs.grad_y_MD) * layer.retrieved_per_token
    gathered = memory.table_bytes(d_model, num_pairs)
    touched = memory.table_bytes(d_model, min(num_pairs, num_experts))
    held = table + sum(
        tensor.numel() * tensor.element_size()
        for state in ours.optimizers[0].state.values()
        for tensor in state.values()
    )
    forward, step = {
        # The touched rows' gradient, and the values, moments and their new ones gathered.
        "reference": (0, 8 * touched),
        "compiled_reference": (2 * gathered, 3 * table + 2 * gathered),
        "peer_pytorch_adam": (table + 2 * gathered, 4 * table + 2 * gathered),
        "peer_pytorch_sparse_adam": (table + 2 * gathered, 3 * table + 5 * gathered),
    }.get(rival, (0, 0))
    return held + forward, held + step


def _hidden_dim_of_equal_time(ours: Subject, inputs: Inputs, trains: bool) -> int:
    """The width of a dense layer whose step (forward pass where nothing is trained) takes as long as ours."""

    def is_faster(hidden_dim: int) -> bool:
        """In turns with ours, as it is measured afterwards: what else the machine does meets both."""
        pair = {"ours": ours, "dense": dense_subject(inputs.grad_y_MD.shape[1], hidden_dim)}
        calls = {
            name: _step_of(subject, inputs) if trains else timed(_call(_forward, subject, inputs))
            for name, subject in pair.items()
        }
        times = interleaved(calls, _SEARCH_REPEATS)
        return float(np.median(times["dense"].sum(1) / times["ours"].sum(1))) < 1

    low, high = 0, _HIDDEN_STEP
    while high < _MAX_HIDDEN and is_faster(high):
        low, high = high, 2 * high
    while high - low > max(_HIDDEN_STEP, low // 16):
        middle = (low + high) // (2 * _HIDDEN_STEP) * _HIDDEN_STEP
        if is_faster(middle):
            low = middle
        else:
            high = middle
    return high


def _call(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _forward(subject: Subject, inputs: Inputs) -> Tensor:
    return subject.forward(inputs.next())


def _step_of(subject: Subject, inputs: Inputs) -> Callable[[], tuple[float, float, float]]:
    return lambda: subject.step(inputs.next(), inputs.grad_y_MD)


def _spread(values: np.ndarray) -> dict[str, float]:
    return asdict(Spread.of(values))


def _phases(phases: np.ndarray) -> dict[str, dict[str, float]]:
    """Seconds of a step and of its phases, from [repeats, 3]."""
    columns = {"forward_seconds": phases[:, 0], "backward_seconds": phases[:, 1], "update_seconds": phases[:, 2]}
    return {name: _spread(column) for name, column in {**columns, "step_seconds": phases.sum(1)}.items()}


def _rate(amount: float, seconds: np.ndarray) -> float:
    """Billions (1e9) a second, by the median of the seconds."""
    return amount / float(np.median(seconds)) / 1e9
