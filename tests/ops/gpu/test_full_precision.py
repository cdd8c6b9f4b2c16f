"""full_precision: no TF32 inside, and after it the settings of torch as they were, whichever functions made them."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from tinyexperts.ops.gpu.full_precision import full_precision

PLACES = [("cuda", "matmul"), ("cuda", "all"), ("generic", "all")]


def shown():
    return [torch._C._get_fp32_precision_getter(*place) for place in [*PLACES, ("mkldnn", "matmul")]]


def write(place, setting):
    torch._C._set_fp32_precision_setter(*place, setting)


@pytest.fixture(autouse=True)
def settings_of_torch():
    yield
    torch.set_float32_matmul_precision("highest")
    for place in [*PLACES, ("mkldnn", "matmul")]:
        write(place, "none")


@pytest.mark.parametrize("settings", list(itertools.product(["none", "ieee", "tf32"], repeat=3)))
def test_each_setting_of_the_tree_comes_back(settings):
    for place, setting in zip(PLACES, settings, strict=True):
        write(place, setting)
    before = shown()
    with full_precision():
        assert shown()[0] in ("none", "ieee")
        assert shown()[1:] == before[1:]
    assert shown() == before
    # Inherited settings look like their own: change what is above, one after the other.
    for place, setting in ((PLACES[2], "ieee"), (PLACES[2], "tf32"), (PLACES[1], "ieee"), (PLACES[1], "tf32")):
        write(place, setting)
        inherited = setting if settings[1] == "none" or place == PLACES[1] else settings[1]
        assert shown()[0] == (inherited if settings[0] == "none" else settings[0])


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_older_setting_comes_back(precision):
    torch.set_float32_matmul_precision(precision)
    before = shown()
    with full_precision():
        assert shown()[0] == "ieee"
    assert shown() == before
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")


def test_the_oldest_setting_comes_back():
    torch.backends.cuda.matmul.allow_tf32 = True
    with full_precision():
        assert shown()[0] == "ieee"
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"


def test_settings_that_the_older_functions_refuse_come_back():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    with full_precision():
        assert shown()[0] == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_an_error_inside_restores_too():
    torch.set_float32_matmul_precision("high")
    with pytest.raises(ZeroDivisionError), full_precision():
        1 / 0  # noqa: B018
    assert shown()[0] == "tf32"


def test_the_last_of_several_threads_restores():
    torch.set_float32_matmul_precision("high")
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with full_precision():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with full_precision():
        thread.start()
        assert entered.wait(10)
    assert shown()[0] == "ieee"
    leave.set()
    thread.join()
    assert shown()[0] == "tf32"
