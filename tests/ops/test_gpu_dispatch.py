"""What a device lacks for Triton's kernels, as `missing` and `why_not` say it."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from tinyexperts.ops.gpu import dispatch
from tinyexperts.ops.gpu.dispatch import missing

H100 = {"is_amd": False, "device_name": "H100", "capability": (9, 0)}


@pytest.fixture
def triton_is(monkeypatch):
    """A function that puts a Triton of a version where the kernels look for it."""

    def put(version: str) -> None:
        module = types.ModuleType("triton")
        module.__version__ = version
        monkeypatch.setitem(sys.modules, "triton", module)

    return put


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.10.0", "4.0", "3.6.0+git12345", "3.7rc1"])
def test_nothing_is_missing(triton_is, version):
    triton_is(version)
    assert missing(**H100) is None
    assert missing(is_amd=False, device_name="A100", capability=(8, 0)) is None


def test_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert missing(**H100) == "Triton is not installed: pip install 'tinyexperts[gpu]'"


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'setuptools'", name="setuptools"), OSError("libLLVM.so"), ImportError("_C")],
)
def test_a_triton_that_does_not_work(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    assert missing(**H100) == f"Triton can't be imported: {error}"


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.0"])
def test_an_old_triton(triton_is, version):
    triton_is(version)
    assert missing(**H100) == f"Triton must be 3.6 or newer, found {version}"


def test_an_old_device(triton_is):
    triton_is("3.7.1")
    found = missing(is_amd=False, device_name="Tesla T4", capability=(7, 5))
    assert found == "the compute capability must be 8.0 or higher, and that of Tesla T4 is 7.5"


def test_amd_is_tried_where_it_is_asked_for(triton_is, monkeypatch):
    triton_is("3.7.1")
    found = missing(is_amd=True, device_name="MI300X", capability=(9, 4))
    assert found == "the kernels compile for AMD's devices, but have run on none: try TINYEXPERTS_KERNELS=triton"
    monkeypatch.setattr(dispatch, "SETTING", "triton")
    assert missing(is_amd=True, device_name="MI300X", capability=(9, 4)) is None


@pytest.fixture
def old_device(triton_is, monkeypatch):
    triton_is("3.7.1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    dispatch._missing_on.cache_clear()
    yield torch.device("cuda", 3)
    dispatch._missing_on.cache_clear()


def test_what_is_missing_is_told_once(old_device):
    with pytest.warns(RuntimeWarning, match="the operators run in plain torch on device 3: the compute") as record:
        reasons = [dispatch.why_not(old_device) for _ in range(3)]
    assert len(record) == 1
    assert len(set(reasons)) == 1
    assert reasons[0].startswith("the compute capability must be 8.0")


def test_the_setting_portable_asks_no_device(monkeypatch):
    monkeypatch.setattr(dispatch, "SETTING", "portable")
    assert dispatch.why_not(torch.device("cuda", 3)) == "TINYEXPERTS_KERNELS=portable"
