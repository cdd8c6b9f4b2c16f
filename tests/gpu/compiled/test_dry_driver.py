"""The driver that runs nothing compiles kernels as a real launch does, and sees what is wrong with them."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language


@triton.jit
def _double(source, target, n, B: tl.constexpr):
    offsets = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(target + offsets, 2 * tl.load(source + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def _casts_an_int(target, n):
    tl.store(target, n.to(tl.int64))


@triton.jit
def _holds_too_much(source, target, B: tl.constexpr):
    offsets = tl.arange(0, B)
    values = tl.load(source + offsets)
    tl.store(target + offsets, values * tl.sum(values))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_launch_is_compiled_for_the_target(launches, target):
    found = launches(target)
    source, result = torch.ones(1024), torch.zeros(1024)
    _double[(2, 3)](source, result, 1024, 512, num_warps=4)
    assert not result.any()
    (launch,) = found
    assert (launch.kernel, launch.target, launch.grid, launch.num_warps) == ("_double", target, (2, 3, 1), 4)
    assert launch.shared_bytes == 0
    assert 3 <= launch.code.registers <= 32
    assert launch.code.spills == 0
    # 512 numbers for 128 threads of NVIDIA's are 16 bytes each, and for 256 of AMD's 8 bytes.
    width = 8 if target == "gfx942" else 16
    assert set(launch.code.global_loads()) == set(launch.code.global_stores()) == {width}


def test_widths_follow_the_type_and_the_alignment_of_the_arguments(launches):
    found = launches("sm_90")
    for dtype, offset in ((torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0), (torch.int8, 3)):
        memory = torch.zeros(1032, dtype=dtype)
        _double[(1,)](memory[offset:], torch.zeros(1024, dtype=dtype), 1024, 1024, num_warps=4)
    assert [set(launch.code.global_loads()) for launch in found] == [{16}, {4}, {16}, {1}]
    assert [launch.code.count("LDG") for launch in found] == [2, 8, 1, 8]


def test_one_target_after_the_other(launches):
    """Triton keeps kernels by the number of a device, so one target must not take another's."""
    source = torch.ones(512)
    names = []
    for target in ("sm_90", "sm_80", "sm_90"):
        found = launches(target)
        _double[(1,)](source, source, 512, 512)
        names += [launch.files["ptx"].read_text().split(".target ")[1].split()[0] for launch in found]
    assert names == ["sm_90a", "sm_80", "sm_90a"]


def test_an_int_of_one_is_a_constant_as_at_a_real_launch(launches):
    launches("sm_90")
    target = torch.zeros(1, dtype=torch.int64)
    _casts_an_int[(1,)](target, 2)
    with pytest.raises(triton.CompilationError, match="to"):
        _casts_an_int[(1,)](target, 1)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_that_spills_is_seen(launches, target):
    found = launches(target)
    for numbers, warps in ((1024, 1), (32 * 1024, 1)):
        memory = torch.zeros(numbers)
        _holds_too_much[(1,)](memory, memory, numbers, num_warps=warps)
    assert found[0].code.spills == 0
    assert found[1].code.spills > 10


def test_a_grid_beyond_the_device_s_is_refused(launches):
    launches("sm_90")
    memory = torch.zeros(512)
    with pytest.raises(ValueError, match=r"a grid of \(1, 65536, 1\) is beyond"):
        _double[(1, 65536)](memory, memory, 512, 512)


def test_the_driver_is_taken_back():
    from dry_driver import dry_driver

    before = triton.runtime.driver._active
    with dry_driver("sm_90"):
        assert triton.runtime.driver.active.get_current_target().arch == 90
    assert triton.runtime.driver._active is before
    assert not triton.knobs.runtime.kernel_load_end_hook.calls
