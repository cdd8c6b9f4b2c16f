"""The baselines of the layer: how each is made, the memory that it needs, and its times in turns with ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tinyexperts.bench import contestants, memory
from tinyexperts.bench.contestants import Contestant, OurLayer
from tinyexperts.bench.inputs import Inputs
from tinyexperts.bench.timing import Spread, StepTimes, interleaved, timed
from tinyexperts.layers import DenseFFN

BaselineName = Literal[
    "reference",
    "compiled_reference",
    "dense_equal_width",
    "dense_equal_time",
    "peer_pytorch_adam",
    "peer_pytorch_sparse_adam",
]
# Equal time is looked for among multiples of this, up to this.
_HIDDEN_STEP, _MAX_HIDDEN = 16, 1 << 16
_SEARCH_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class _Bytes:
    """The bytes, in fp32, of a table, of a batch's retrieved rows, and of at most the rows that it touches."""

    table: int
    gathered: int
    touched: int


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A layer that ours is compared with."""

    label: str
    """The name for readers."""
    make: Callable[[OurLayer, Inputs], Contestant]
    """The function that makes it from ours, and from inputs for it; it may raise `Unavailable`."""
    forward_bytes: Callable[[_Bytes], int] = lambda of: 0
    """The bytes that a forward pass needs in addition to ours: a little above what was measured."""
    step_bytes: Callable[[_Bytes], int] = lambda of: 0
    """The bytes that a training step needs, as `forward_bytes`."""
    only_trained: bool = False
    """True if its forward pass is that of another baseline."""


@dataclass(frozen=True, kw_only=True)
class BaselineMeasurement:
    """The times of a baseline and ours of the same rounds; ratios are its time over ours, round by round."""

    hidden_dim: int | None = None
    """The hidden neurons of a dense layer."""
    forward_seconds: Spread
    our_forward_seconds: Spread
    forward_ratio: Spread
    step: StepTimes | None = None
    """The times of a training step; None, as in the fields below, where nothing is trained."""
    our_step: StepTimes | None = None
    step_ratio: Spread | None = None
    activation_bytes_per_token: float | None = None


class Unavailable(Exception):
    """The reason why a baseline can't be made on this machine."""


def measure_baseline(
    baseline: Baseline, ours: OurLayer, inputs: Inputs, *, repeats: int, max_bytes: float
) -> tuple[BaselineMeasurement | None, str | None]:
    """Measure a baseline in turns with our layer, which was also measured alone, at another moment.

    Args:
        baseline (Baseline): the baseline.
        ours (OurLayer): our layer.
        inputs (Inputs): tokens for both.
        repeats (int): rounds that a median is taken over.
        max_bytes (float): limit on tables, gradients and optimizers' state of both.

    Returns:
        The measurement, None if it is left out; and the reason why it, or its training step, is left out.
    """
    held, sizes = _held_bytes(ours), _bytes_of(ours, inputs)
    forward_bytes, step_bytes = held + baseline.forward_bytes(sizes), held + baseline.step_bytes(sizes)
    reason = None
    if forward_bytes > max_bytes:
        return None, f"it needs {memory.gib(forward_bytes)} in addition to ours"
    if inputs.trains and step_bytes > max_bytes:
        reason = f"the training step needs {memory.gib(step_bytes)} in addition to ours"
    try:
        theirs = baseline.make(ours, inputs)
    except Unavailable as error:
        return None, str(error)
    theirs.module.train(inputs.trains)
    pair = {"ours": ours, "theirs": theirs}
    times = interleaved({name: timed(each.forward_of(inputs)) for name, each in pair.items()}, repeats)
    measured = BaselineMeasurement(
        hidden_dim=theirs.module.up.out_features if isinstance(theirs.module, DenseFFN) else None,
        forward_seconds=Spread.of(times["theirs"][:, 0]),
        our_forward_seconds=Spread.of(times["ours"][:, 0]),
        forward_ratio=Spread.of(times["theirs"][:, 0] / times["ours"][:, 0]),
    )
    if not inputs.trains or reason is not None:
        return measured, reason
    times = interleaved({name: each.step_of(inputs) for name, each in pair.items()}, repeats)
    trained = replace(
        measured,
        step=StepTimes.of(times["theirs"]),
        our_step=StepTimes.of(times["ours"]),
        step_ratio=Spread.of(times["theirs"].sum(1) / times["ours"].sum(1)),
        activation_bytes_per_token=theirs.activation_bytes(inputs.next()) / len(inputs.grad_y_MD),
    )
    return trained, None


def _held_bytes(ours: OurLayer) -> int:
    """Return the bytes of our table, which stays while a baseline is measured, and of its optimizer's state."""
    states = ours.optimizers[0].state.values()
    state_bytes: int = sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())
    return ours.module.experts.numel() * 4 + state_bytes


def _bytes_of(ours: OurLayer, inputs: Inputs) -> _Bytes:
    num_experts, _, d_model = ours.module.experts.shape
    num_pairs = len(inputs.grad_y_MD) * ours.module.retrieved_per_token
    rows = {"table": num_experts, "gathered": num_pairs, "touched": min(num_pairs, num_experts)}
    return _Bytes(**{name: memory.table_bytes(d_model, count) for name, count in rows.items()})


def _compiled_reference(ours: OurLayer, inputs: Inputs) -> Contestant:
    contestant = contestants.compiled_reference(ours.module)
    contestant.module.train(inputs.trains)
    try:
        contestant.forward(inputs.next())
    except RuntimeError as error:  # torch's compiler wants one for C++, which not every machine has
        raise Unavailable(f"torch.compile failed ({str(error).strip().splitlines()[0]})") from error
    return contestant


def _dense_of_equal_width(ours: OurLayer, inputs: Inputs) -> Contestant:
    return contestants.dense(ours.module.experts.shape[2], ours.module.retrieved_per_token)


def _dense_of_equal_time(ours: OurLayer, inputs: Inputs) -> Contestant:
    return contestants.dense(ours.module.experts.shape[2], _hidden_dim_of_equal_time(ours, inputs))


def _peer_pytorch(ours: OurLayer, *, sparse: bool) -> Contestant:
    if importlib.util.find_spec("PEER_pytorch") is None:
        raise Unavailable("not installed (pip install PEER-pytorch)")
    return contestants.peer_pytorch(ours.module, sparse=sparse)


BASELINES: dict[BaselineName, Baseline] = {
    "reference": Baseline(
        label="operators in plain torch",
        make=lambda ours, inputs: contestants.reference(ours),
        step_bytes=lambda of: 8 * of.touched,  # their gradient, and values, moments and their new ones gathered
    ),
    "compiled_reference": Baseline(
        label="reference, torch.compile",
        make=_compiled_reference,
        forward_bytes=lambda of: 2 * of.gathered,
        step_bytes=lambda of: 3 * of.table + 2 * of.gathered,
    ),
    "dense_equal_width": Baseline(label="dense, equal width", make=_dense_of_equal_width),
    "dense_equal_time": Baseline(label="dense, equal time", make=_dense_of_equal_time),
    "peer_pytorch_adam": Baseline(
        label="PEER-pytorch, Adam",
        make=lambda ours, inputs: _peer_pytorch(ours, sparse=False),
        forward_bytes=lambda of: of.table + 2 * of.gathered,
        step_bytes=lambda of: 4 * of.table + 2 * of.gathered,
    ),
    "peer_pytorch_sparse_adam": Baseline(
        label="PEER-pytorch, SparseAdam",
        make=lambda ours, inputs: _peer_pytorch(ours, sparse=True),
        forward_bytes=lambda of: of.table + 2 * of.gathered,
        step_bytes=lambda of: 3 * of.table + 5 * of.gathered,
        only_trained=True,
    ),
}


def _hidden_dim_of_equal_time(ours: Contestant, inputs: Inputs) -> int:
    """Find the width of a dense layer whose step (forward pass where nothing is trained) takes as long as ours."""

    def is_faster(hidden_dim: int) -> bool:
        """Compare in turns with ours, as it is measured afterwards: the machine's other work affects both."""
        pair = {"ours": ours, "dense": contestants.dense(inputs.grad_y_MD.shape[1], hidden_dim)}
        calls = {
            name: each.step_of(inputs) if inputs.trains else timed(each.forward_of(inputs))
            for name, each in pair.items()
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
