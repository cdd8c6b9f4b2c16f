"""What the layer is measured beside, in turns with it: what each rival is, the memory that it needs, and its times."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinyexperts.bench import memory
from tinyexperts.bench.inputs import Inputs
from tinyexperts.bench.subjects import (
    Subject,
    compiled_reference_subject,
    dense_subject,
    peer_pytorch_subject,
    reference_subject,
)
from tinyexperts.bench.timing import interleaved, phases_of_step, spread, timed
from tinyexperts.layers import PEER, DenseFFN

RivalName = Literal[
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
    """Of a table in fp32, of the rows that a batch retrieves, gathered, and at most of those that it touches."""

    table: int
    gathered: int
    touched: int


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A layer beside ours."""

    label: str
    """For readers."""
    make: Callable[[Subject, Inputs], Subject]
    """From ours, and inputs for it; raises `Unavailable`."""
    forward_bytes: Callable[[_Bytes], int] = lambda of: 0
    """That a forward pass needs beside ours: a little above what was measured."""
    step_bytes: Callable[[_Bytes], int] = lambda of: 0
    """As `forward_bytes`, of a training step."""
    only_trained: bool = False
    """Its forward pass is another rival's."""


class Unavailable(Exception):
    """A rival can't be made on this machine, and why."""


def measure_rival(
    rival: Rival, ours: Subject, inputs: Inputs, *, repeats: int, max_bytes: float
) -> tuple[dict[str, Any] | None, str | None]:
    """A rival in turns with our layer, and why it or its training step is left out, where it is.

    Ratios are its time over ours, round by round; ours is that of the same rounds, and not of when it ran alone.
    """
    held, sizes = _held_bytes(ours), _bytes_of(ours, inputs)
    forward_bytes, step_bytes = held + rival.forward_bytes(sizes), held + rival.step_bytes(sizes)
    reason = None
    if forward_bytes > max_bytes:
        return None, f"it needs {memory.gib(forward_bytes)} beside ours"
    if inputs.trains and step_bytes > max_bytes:
        reason = f"the training step needs {memory.gib(step_bytes)} beside ours"
    try:
        subject = rival.make(ours, inputs)
    except Unavailable as error:
        return None, str(error)
    subject.module.train(inputs.trains)
    result: dict[str, Any] = {}
    if isinstance(subject.module, DenseFFN):
        result["hidden_dim"] = subject.module.up.out_features
    pair = {"ours": ours, "rival": subject}
    times = interleaved({name: timed(one.forward_of(inputs)) for name, one in pair.items()}, repeats)
    result["forward_seconds"] = spread(times["rival"][:, 0])
    result["our_forward_seconds"] = spread(times["ours"][:, 0])
    result["forward_ratio"] = spread(times["rival"][:, 0] / times["ours"][:, 0])
    if inputs.trains and reason is None:
        times = interleaved({name: one.step_of(inputs) for name, one in pair.items()}, repeats)
        result["step"] = phases_of_step(times["rival"])
        result["our_step"] = phases_of_step(times["ours"])
        result["step_ratio"] = spread(times["rival"].sum(1) / times["ours"].sum(1))
        result["activation_bytes_per_token"] = subject.activation_bytes(inputs.next()) / len(inputs.grad_y_MD)
    return result, reason


def _held_bytes(ours: Subject) -> int:
    """Of our table, which stays while a rival is measured, and of its optimiser's state."""
    states = ours.optimizers[0].state.values()
    state_bytes = sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())
    return _layer(ours).experts.numel() * 4 + state_bytes


def _bytes_of(ours: Subject, inputs: Inputs) -> _Bytes:
    layer = _layer(ours)
    num_experts, _, d_model = layer.experts.shape
    num_pairs = len(inputs.grad_y_MD) * layer.retrieved_per_token
    rows = {"table": num_experts, "gathered": num_pairs, "touched": min(num_pairs, num_experts)}
    return _Bytes(**{name: memory.table_bytes(d_model, count) for name, count in rows.items()})


def _layer(ours: Subject) -> PEER:
    assert isinstance(ours.module, PEER)
    return ours.module


def _compiled_reference(ours: Subject, inputs: Inputs) -> Subject:
    subject = compiled_reference_subject(_layer(ours))
    subject.module.train(inputs.trains)
    try:
        subject.forward(inputs.next())
    except RuntimeError as error:  # torch's compiler wants one for C++, which not every machine has
        raise Unavailable(f"torch.compile failed ({str(error).strip().splitlines()[0]})") from error
    return subject


def _dense_of_equal_width(ours: Subject, inputs: Inputs) -> Subject:
    layer = _layer(ours)
    return dense_subject(layer.experts.shape[2], layer.retrieved_per_token)


def _dense_of_equal_time(ours: Subject, inputs: Inputs) -> Subject:
    return dense_subject(_layer(ours).experts.shape[2], _hidden_dim_of_equal_time(ours, inputs))


def _peer_pytorch(ours: Subject, *, sparse: bool) -> Subject:
    if importlib.util.find_spec("PEER_pytorch") is None:
        raise Unavailable("not installed (pip install PEER-pytorch)")
    return peer_pytorch_subject(_layer(ours), sparse=sparse)


RIVALS: dict[RivalName, Rival] = {
    "reference": Rival(
        label="operators in plain torch",
        make=lambda ours, inputs: reference_subject(ours),
        step_bytes=lambda of: 8 * of.touched,  # their gradient, and values, moments and their new ones gathered
    ),
    "compiled_reference": Rival(
        label="reference, torch.compile",
        make=_compiled_reference,
        forward_bytes=lambda of: 2 * of.gathered,
        step_bytes=lambda of: 3 * of.table + 2 * of.gathered,
    ),
    "dense_equal_width": Rival(label="dense, equal width", make=_dense_of_equal_width),
    "dense_equal_time": Rival(label="dense, equal time", make=_dense_of_equal_time),
    "peer_pytorch_adam": Rival(
        label="PEER-pytorch, Adam",
        make=lambda ours, inputs: _peer_pytorch(ours, sparse=False),
        forward_bytes=lambda of: of.table + 2 * of.gathered,
        step_bytes=lambda of: 4 * of.table + 2 * of.gathered,
    ),
    "peer_pytorch_sparse_adam": Rival(
        label="PEER-pytorch, SparseAdam",
        make=lambda ours, inputs: _peer_pytorch(ours, sparse=True),
        forward_bytes=lambda of: of.table + 2 * of.gathered,
        step_bytes=lambda of: 3 * of.table + 5 * of.gathered,
        only_trained=True,
    ),
}


def _hidden_dim_of_equal_time(ours: Subject, inputs: Inputs) -> int:
    """The width of a dense layer whose step (forward pass where nothing is trained) takes as long as ours."""

    def is_faster(hidden_dim: int) -> bool:
        """In turns with ours, as it is measured afterwards: what else the machine does meets both."""
        pair = {"ours": ours, "dense": dense_subject(inputs.grad_y_MD.shape[1], hidden_dim)}
        calls = {
            name: subject.step_of(inputs) if inputs.trains else timed(subject.forward_of(inputs))
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
