"""The measurement of one setting: the experts' operator, the layer, its baselines; and the JSON that holds it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter

from tinyexperts.bench import memory
from tinyexperts.bench.baselines import BASELINES, BaselineMeasurement, BaselineName, measure_baseline
from tinyexperts.bench.check import check_kernels
from tinyexperts.bench.inputs import Inputs
from tinyexperts.bench.layer import LayerMeasurement, measure_layer
from tinyexperts.bench.operator import OperatorMeasurement, measure_operator
from tinyexperts.layers import PEER

SECOND_MOMENTS = ("element", "row")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything about one setting."""

    d_model: int
    num_experts: int
    num_tokens: int
    threads: int
    num_heads: int
    experts_per_head: int
    operator: dict[str, OperatorMeasurement]
    """The operator alone, by the kind of its ids."""
    layer: LayerMeasurement
    baselines: dict[str, BaselineMeasurement]
    left_out: list[str]
    """A sentence for each thing that was not measured."""


def to_json(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as the files of results hold it: baselines are `rivals` there, and lack what is None."""
    content = {"rivals" if name == "baselines" else name: value for name, value in asdict(measurement).items()}
    for name, baseline in content["rivals"].items():
        content["rivals"][name] = {key: value for key, value in baseline.items() if value is not None}
    return content


def from_json(content: dict[str, Any]) -> Measurement:
    """Return the measurement that `to_json` wrote."""
    return TypeAdapter(Measurement).validate_python({**content, "baselines": content["rivals"]})


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use this many threads inside, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_setting(
    layer: PEER,
    *,
    num_tokens: int,
    threads: int,
    ids: Collection[str],
    repeats: int,
    max_bytes: float,
    baselines: Collection[BaselineName] = tuple(BASELINES),
    show_progress: Callable[[str], None] = lambda current: None,
) -> Measurement:
    """Measure everything about one setting; M = 1 in evaluation without gradients, M > 1 in training.

    Args:
        layer (PEER): a layer of `make_layer`.
        num_tokens (int): tokens of a batch M.
        threads (int): CPU threads.
        ids (Collection[str]): kinds of ids of the operator alone; a layer's own are those that its router chooses.
        repeats (int): rounds that a median is taken over.
        max_bytes (float): limit on tables, gradients and optimizers' state at a time; what needs more is left out.
        baselines (Collection[str]): names of BASELINES to measure.
        show_progress (Callable[[str], None]): called with the name of each thing before it is measured.

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
        show_progress("checking the kernels")
        with torch.enable_grad():
            check_kernels(layer, num_tokens, SECOND_MOMENTS, generator)
        memory.restart_peak()
        operator = {}
        for kind in ids:
            show_progress(f"experts, {kind} ids")
            operator[kind] = measure_operator(layer, kind, num_tokens, repeats=repeats, generator=generator)
        show_progress("layer")
        inputs = Inputs(num_tokens, d_model, trains=trains, generator=generator)
        layer.train(trains)
        # The moment that is kept for the baselines comes last.
        ours, measured_layer = measure_layer(layer, inputs, moments[::-1] if trains else (), repeats=repeats)
        measured_baselines: dict[str, BaselineMeasurement] = {}
        for name in baselines:
            baseline = BASELINES[name]
            if baseline.only_trained and not trains:
                continue
            show_progress(baseline.label)
            measured, reason = measure_baseline(baseline, ours, inputs, repeats=repeats, max_bytes=max_bytes)
            gc.collect()
            if measured is not None:
                measured_baselines[name] = measured
            if reason is not None:
                left_out.append(f"{baseline.label}: {reason}")
    return Measurement(
        d_model=d_model,
        num_experts=num_experts,
        num_tokens=num_tokens,
        threads=threads,
        num_heads=layer.router.num_heads,
        experts_per_head=layer.router.experts_per_head,
        operator=operator,
        layer=measured_layer,
        baselines=measured_baselines,
        left_out=left_out,
    )
