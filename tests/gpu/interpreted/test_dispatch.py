"""Which code runs on a CUDA device, on CPU tensors: with kernels that are right, wrong, broken or beyond limits."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
import triton
import triton.language as tl

from tinyexperts.errors import InputError
from tinyexperts.ops.gpu import dispatch
from tinyexperts.ops.gpu.dispatch import BeyondLimits, GpuKernel, on_gpu

LONGEST = 64


@triton.jit
def _scale_kernel(x, out, factor, n, FAULT: tl.constexpr, B: tl.constexpr):
    offsets = tl.arange(0, B)
    values = tl.load(x + offsets, mask=offsets < n, other=0.0).to(tl.float32) * factor
    values += tl.where(offsets == n - 1, FAULT, 0.0)
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=offsets < n)


def _launch(x, out, factor, fault=0.0):
    _scale_kernel[(1,)](x, out, factor, len(x), fault, LONGEST)
    return out


def _plan(x, factor):
    if len(x) > LONGEST:
        raise BeyondLimits(f"x must have at most {LONGEST} numbers, got {len(x)}")
    return x.dtype


def _example(x, factor):
    return torch.linspace(-1, 1, 5).to(x.dtype), 3.0


def _right(plan, x, factor):
    return _launch(x, torch.empty_like(x), factor)


def _wrong(plan, x, factor):
    return _launch(x, torch.empty_like(x), factor, fault=0.25)


def _raises(plan, x, factor):
    raise RuntimeError("no kernel image")


def _leaves_an_element(plan, x, factor):
    out = torch.empty_like(x)
    _launch(x[:-1], out, factor)
    return out


def scale(x, factor):
    """The operation in plain torch; its calls are counted."""
    scale.calls += 1
    return x * factor


def scale_(x, factor):
    """The same in place."""
    scale.calls += 1
    x.mul_(factor)


@pytest.fixture(autouse=True)
def fresh_dispatch(monkeypatch, triton_is_allowed):
    """A dispatch that has checked nothing yet."""
    monkeypatch.setattr(dispatch, "_faults", {})
    monkeypatch.setattr(dispatch, "_unloadable", {})
    monkeypatch.setattr(scale, "calls", 0, raising=False)


@pytest.fixture
def make_operation(monkeypatch):
    """A function that makes the function for CUDA devices of a kernel, which an importable module holds."""

    def make(run, *, portable=scale, plan=_plan, example=_example, **options):
        module = types.ModuleType("planted_kernels")
        module.KERNEL = GpuKernel(plan=plan, run=run, example=example, **options)
        monkeypatch.setitem(sys.modules, "planted_kernels", module)
        return on_gpu("planted_kernels:KERNEL", portable)

    return make


X = torch.tensor([1.0, -2.0, 0.5])


def test_a_kernel_that_passes_its_check_runs(make_operation, launched_kernels):
    operation = make_operation(_right)
    assert torch.equal(operation(X, 2.0), 2 * X)
    assert (len(launched_kernels), scale.calls) == (2, 1)  # the check, which asks plain torch, and the call
    assert torch.equal(operation(X, 3.0), 3 * X)
    assert (len(launched_kernels), scale.calls) == (3, 1)


def test_kernels_and_their_check_are_launched_on_the_device_of_the_operands(make_operation, monkeypatch):
    """Triton launches on the current device, which may be another one."""
    events = []

    class Guard:
        def __init__(self, operand):
            self.shape = operand.shape

        def __enter__(self):
            events.append(f"device of {list(self.shape)}")

        def __exit__(self, *error):
            events.append("device before")

    def run(plan, x, factor):
        events.append(f"launch with {len(x)} numbers")
        return _right(plan, x, factor)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    make_operation(run=run)(torch.ones(7), 2.0)
    assert events == ["device of [7]", "launch with 5 numbers", "launch with 7 numbers", "device before"]


def test_each_plan_is_checked(make_operation, launched_kernels):
    operation = make_operation(_right)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(operation(X.to(dtype), 2.0), 2 * X.to(dtype))
    assert (len(launched_kernels), scale.calls) == (3 + 4, 3)


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (_wrong, r"output 0 differs by 0\.053 of its norm"),
        (_raises, "RuntimeError: no kernel image"),
        (_leaves_an_element, "output 0 differs by nan of its norm"),
        (lambda plan, x, factor: (x * factor, x), "ValueError: zip"),
        (lambda plan, x, factor: (x * factor)[:-1], "output 0 differs by inf of its norm"),
    ],
    ids=["wrong", "raises", "leaves an element", "too many outputs", "short"],
)
def test_a_faulty_kernel_is_told_once_and_replaced(make_operation, run, fault):
    operation = make_operation(run)
    versions = rf"\(cpu, torch {torch.__version__}, Triton {triton.__version__}; torch\.float32\)".replace("+", r"\+")
    told = f"scale runs in plain torch from now on, since Triton's kernel fails its check: {fault}.* {versions}"
    with pytest.warns(RuntimeWarning, match=told) as record:
        assert torch.equal(operation(X, 2.0), 2 * X)
    assert len(record) == 1
    assert "Please report" in str(record[0].message)
    calls = scale.calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(operation(X, 3.0), 3 * X)
    assert scale.calls == calls + 1


def test_an_example_that_raises_is_a_fault_too(make_operation):
    def example(x, factor):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    operation = make_operation(_right, example=example)
    with pytest.warns(RuntimeWarning, match="illegal memory access"):
        assert torch.equal(operation(X, 2.0), 2 * X)


def test_a_check_without_memory_says_nothing_about_the_kernel(make_operation):
    def example(x, factor):
        raise torch.OutOfMemoryError("out of memory")

    operation = make_operation(_right, example=example)
    with pytest.raises(torch.OutOfMemoryError):
        operation(X, 2.0)
    assert dispatch._faults == {}


@pytest.mark.parametrize(("run", "fault"), [(_wrong, "output 0 differs"), (_raises, "RuntimeError: no kernel image")])
def test_the_setting_triton_takes_no_plain_torch_instead(make_operation, monkeypatch, run, fault):
    monkeypatch.setattr(dispatch, "SETTING", "triton")
    operation = make_operation(run)
    for _ in range(2):
        with pytest.raises(InputError, match=f"TINYEXPERTS_KERNELS=triton, .* kernel of scale can't be used: {fault}"):
            operation(X, 2.0)


def test_the_setting_triton_runs_what_is_right(make_operation, monkeypatch, launched_kernels):
    monkeypatch.setattr(dispatch, "SETTING", "triton")
    assert torch.equal(make_operation(_right)(X, 2.0), 2 * X)
    assert len(launched_kernels) == 2


def test_beyond_limits_is_plain_torch_in_silence(make_operation, monkeypatch, launched_kernels):
    operation = make_operation(_right)
    long = torch.arange(LONGEST + 1.0)
    assert torch.equal(operation(long, 2.0), 2 * long)
    assert (launched_kernels, scale.calls) == ([], 1)
    monkeypatch.setattr(dispatch, "SETTING", "triton")
    with pytest.raises(InputError, match="can't be used: x must have at most 64 numbers, got 65"):
        operation(long, 2.0)


def test_limits_found_at_the_launch_are_no_fault(make_operation, launched_kernels):
    def run(plan, x, factor):
        raise BeyondLimits("too many pairs")

    operation = make_operation(run)
    assert torch.equal(operation(X, 2.0), 2 * X)
    assert dispatch._faults == {}


def test_what_a_checked_kernel_raises_later_reaches_the_caller(make_operation):
    def run(plan, x, factor):
        if len(x) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return _right(plan, x, factor)

    operation = make_operation(run)
    with pytest.raises(torch.OutOfMemoryError):
        operation(X, 2.0)


def test_inside_of_a_capture_no_kernel_is_checked(make_operation, monkeypatch, launched_kernels):
    operation = make_operation(_right)
    monkeypatch.setattr(dispatch, "is_capturing", lambda device: True)
    with pytest.warns(
        RuntimeWarning, match="scale runs in plain torch: a kernel is checked at its first use, .*capture"
    ):
        assert torch.equal(operation(X, 2.0), 2 * X)
    assert launched_kernels == []
    monkeypatch.setattr(dispatch, "SETTING", "triton")
    with pytest.raises(InputError, match="run it once before"):
        operation(X, 2.0)
    monkeypatch.setattr(dispatch, "is_capturing", lambda device: False)
    operation(X, 2.0)
    monkeypatch.setattr(dispatch, "is_capturing", lambda device: True)
    assert torch.equal(operation(X, 4.0), 4 * X)
    assert len(launched_kernels) == 3


def _in_place(plan, x, factor):
    _launch(x, x, factor)


def _wrong_in_place(plan, x, factor):
    _launch(x, x, factor, fault=0.25)


def test_a_kernel_that_changes_its_operands(make_operation, launched_kernels):
    operation = make_operation(_in_place, portable=scale_, num_changed=1)
    x = X.clone()
    assert operation(x, 2.0) is None
    assert torch.equal(x, 2 * X)
    assert len(launched_kernels) == 2


def test_a_check_leaves_the_operands_of_the_caller_alone(make_operation, launched_kernels):
    operation = make_operation(_wrong_in_place, portable=scale_, num_changed=1)
    x = X.clone()
    with pytest.warns(RuntimeWarning, match="scale_ runs in plain torch from now on"):
        operation(x, 2.0)
    assert torch.equal(x, 2 * X)
    assert len(launched_kernels) == 1


def test_what_is_compared_can_be_chosen(make_operation):
    """Parts whose sum is the output, in two kernels of other parts."""

    def parts(plan, x, factor):
        return torch.stack([_right(plan, x, factor).sum(), torch.tensor(1.0)])

    def portable(x, factor):
        return (x * factor).sum() + 1

    x = torch.rand(5)
    assert make_operation(parts, portable=portable, compared=torch.sum)(x, 2.0).shape == (2,)


def test_integers_must_be_equal(make_operation):
    def portable(x, factor):
        return (x * factor).round().long()

    def run(plan, x, factor, add=0):
        return portable(x, factor) + add

    assert make_operation(run, portable=portable)(X, 2.0).tolist() == [2, -4, 1]
    dispatch._faults.clear()
    wrong = make_operation(lambda *operands: run(*operands, add=1), portable=portable)
    with pytest.warns(RuntimeWarning, match="output 0 differs by inf"):
        assert wrong(X, 2.0).tolist() == [2, -4, 1]


def test_kernels_that_can_t_be_imported_are_told_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels_of_another_version", None)
    operation = on_gpu("kernels_of_another_version:KERNEL", scale)
    with pytest.warns(
        RuntimeWarning, match="kernels_of_another_version can't be imported: ModuleNotFoundError"
    ) as record:
        assert torch.equal(operation(X, 2.0), 2 * X)
    assert len(record) == 1
    assert torch.equal(operation(X, 2.0), 2 * X)
    monkeypatch.setattr(dispatch, "SETTING", "triton")
    with pytest.raises(InputError, match="can't be used: kernels_of_another_version can't be imported"):
        operation(X, 2.0)
