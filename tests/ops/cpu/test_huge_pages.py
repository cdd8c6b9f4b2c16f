"""Huge pages are asked for behind large tensors, and a refusal changes nothing."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch

from tinyexperts.ops.cpu import huge_pages

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux takes the advice")


@pytest.fixture
def advice(monkeypatch):
    """What is asked of the system, which refuses."""
    asked = []

    class Refusing:
        def madvise(self, start, length, advice):
            asked.append((start.value, length.value, advice))
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: Refusing())
    return asked


LARGE = 3 * 2**22 + 1  # fp32: 48 MiB and a bit


@linux_only
def test_huge_pages_are_asked_for_inside_a_large_tensor_and_a_refusal_changes_nothing(advice):
    for other in (torch.zeros(1000), torch.empty(2**40, device="meta")):
        assert huge_pages.prefer_huge_pages(other) is other
        assert not advice
    for large in (torch.zeros(LARGE), torch.zeros(LARGE)[3:], torch.zeros(3, LARGE // 3, dtype=torch.bfloat16)):
        assert huge_pages.prefer_huge_pages(large) is large
        start, length, number = advice.pop()
        assert not advice
        assert number == mmap.MADV_HUGEPAGE
        assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
        size = large.numel() * large.element_size()
        assert large.data_ptr() <= start < start + length <= large.data_ptr() + size
        assert length > size - 2 * mmap.PAGESIZE
        assert not large.any()
    made = huge_pages.empty(3, LARGE // 3, 1, dtype=torch.float32)
    assert (made.shape, made.dtype) == ((3, LARGE // 3, 1), torch.float32)
    assert len(advice) == 1


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_on_other_platforms_huge_pages_are_not_asked_for(platform, advice, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    for size in (1000, LARGE):
        tensor = torch.zeros(size)
        assert huge_pages.prefer_huge_pages(tensor) is tensor
    assert huge_pages.empty(LARGE, dtype=torch.float32).shape == (LARGE,)
    assert not advice


def test_huge_pages_for_any_tensor_give_the_tensor_itself():
    meta = torch.empty(2**40, device="meta")
    for tensor in (torch.zeros(LARGE), torch.zeros(5), torch.zeros(0), meta, torch.nn.Parameter(torch.ones(LARGE))):
        assert huge_pages.prefer_huge_pages(tensor) is tensor
    tensor = torch.arange(LARGE, dtype=torch.float32)
    assert torch.equal(huge_pages.prefer_huge_pages(tensor), torch.arange(LARGE, dtype=torch.float32))
