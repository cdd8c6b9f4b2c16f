"""The CPU's kernels compute where nothing can be kept on disk, and are compiled again when their source has changed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core import caching
from operands import randn

import tinyexperts
from tinyexperts.ops.cpu import compile as cpu_compile

PACKAGE = Path(tinyexperts.__file__).parent


def product_and_sum(x, out, start, stop):
    """A kernel; Python can run it as well."""
    for i in range(start, stop):
        total = x[i, 0] * x[i, 0]
        for j in range(1, x.shape[1]):
            total += x[i, j] * x[i, j]
        out[i] = total


@pytest.mark.parametrize("name", ["kernel", "exact_kernel"])
def test_a_kernel_that_can_not_be_kept_on_disk_is_compiled_and_computes(name, monkeypatch):
    # numba refuses a cache if none of these finds a folder that can be written.
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(product_and_sum)
    compiled = getattr(cpu_compile, name)(product_and_sum)
    assert compiled.stats.cache_path is None
    assert compiled.targetoptions["nogil"]
    assert bool(compiled.targetoptions.get("fastmath")) == (name == "kernel")
    x = randn(5, 333).numpy()
    x[3, 7] = np.nan
    got, expected = np.zeros(5, dtype=np.float32), np.zeros(5, dtype=np.float32)
    compiled(x, got, 1, 5)
    product_and_sum(x, expected, 1, 5)
    np.testing.assert_allclose(got, expected, rtol=0 if name == "exact_kernel" else 1e-5)
    assert got[0] == 0
    assert np.isnan(got[3])


def run_python(script, folder, **environment):
    """What a fresh Python that imports from a folder prints, as JSON."""
    dropped = ("NUMBA_", "XDG_CACHE_HOME")
    base = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    command = [sys.executable, "-W", "error", "-c", script]
    base["PYTHONPATH"] = str(folder)
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run(command, cwd=folder, env=base | environment, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


READ_ONLY = """
import json, sys, torch, tinyexperts
from tinyexperts.ops.expert_mlp import cpu
torch.manual_seed(0)
x, experts, weights = torch.randn(6, 5), torch.randn(9, 2, 5), torch.rand(6, 4)
ids = torch.randint(9, (6, 4))
y, _ = cpu.expert_mlp(x, experts, ids, weights, "relu")
expected = torch.einsum("mp,mpd->md", weights * torch.einsum("mpd,md->mp", experts[ids][:, :, 0], x).relu(),
                        experts[ids][:, :, 1])
torch.testing.assert_close(y, expected)
print(json.dumps({"package": tinyexperts.__file__, "cache": cpu._forward.stats.cache_path}))
"""


@pytest.mark.slow
def test_an_installation_that_can_not_be_written_computes(tmp_path):
    copy = tmp_path / "site" / "tinyexperts"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    no_folder = tmp_path / "file"
    no_folder.touch()
    folders = [copy, *(path for path in copy.rglob("*") if path.is_dir())]
    for folder in folders:
        (folder / "__pycache__").touch()  # a file in its place stops root too, whom permissions don't
        folder.chmod(0o555)
    try:
        answers = run_python(READ_ONLY, copy.parent, HOME=str(no_folder / "nobody"))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert answers == {"package": str(copy / "__init__.py"), "cache": None}
    assert all((folder / "__pycache__").is_file() for folder in folders)
    assert not [path for path in tmp_path.rglob("*.nb*") if path.is_file()]


FIRST_CALLS = """
import gc, json, time, torch
from tinyexperts.ops.expert_mlp import cpu as mlp
from tinyexperts.ops.product_key_topk import cpu as topk
torch.manual_seed(0)
collections = []
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]) if phase == "start" else None)
start = time.perf_counter()
scores, ids = topk.product_key_topk(torch.randn(5, 2, 8), torch.randn(2, 9, 4), 3)
middle = time.perf_counter()
y, _ = mlp.expert_mlp(torch.randn(5, 7), torch.randn(81, 2, 7), ids.flatten(1), scores.flatten(1), "gelu")
seconds = {"product_key_topk": middle - start, "expert_mlp": time.perf_counter() - middle}
counts = {kernel.__name__: [sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())]
          for kernel in (topk._top_k_of_sums, mlp._forward)}
print(json.dumps({"seconds": seconds, "full collections": collections.count(2), "enabled": gc.isenabled(),
                  "hits and misses": counts, "y": y.tolist(), "ids": ids.tolist()}))
"""


@pytest.mark.slow
def test_a_second_process_finds_the_kernels_compiled(tmp_path):
    answers = [run_python(FIRST_CALLS, PACKAGE.parent, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    for process, answer in zip(("first", "second"), answers, strict=True):
        print(f"{process} process, first calls: {answer['seconds']}")
        assert answer["full collections"] == 0
        assert answer["enabled"]
    assert answers[0]["hits and misses"] == {"_top_k_of_sums": [0, 1], "_forward": [0, 1]}
    assert answers[1]["hits and misses"] == {"_top_k_of_sums": [1, 0], "_forward": [1, 0]}
    assert answers[0]["y"] == answers[1]["y"]
    assert answers[0]["ids"] == answers[1]["ids"]


EVERY_HALF = """
import json, torch
from tinyexperts.ops.expert_mlp import cpu
experts = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(-1, 1, 16)
ids = torch.arange(len(experts))[:, None]
y, _ = cpu.expert_mlp(torch.zeros(len(ids), 16), experts, ids, torch.ones(len(ids), 1), None)
print(json.dumps(torch.equal(y.nan_to_num(9e9), experts[:, 0].float().nan_to_num(9e9))))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in {"x86_64", "AMD64"}, reason="other processors all convert fp16 themselves"
)
def test_fp16_is_read_exactly_by_a_processor_that_does_not_know_it(tmp_path):
    assert run_python(EVERY_HALF, PACKAGE.parent, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_FEATURES="+avx,+avx2,+fma")


COMPILED_OR_FOUND = """
import json, torch
from tinyexperts.ops.expert_mlp import row_sums
starts = row_sums.find_touched_rows(torch.tensor([[3, 1, 3]]))[2].tolist()
print(json.dumps([starts, sum(row_sums._find_starts.stats.cache_hits.values())]))
"""


@pytest.mark.slow
def test_a_kernel_is_compiled_again_when_a_function_of_another_file_has_changed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "tinyexperts", ignore=shutil.ignore_patterns("__pycache__"))
    other_file = tmp_path / "tinyexperts" / "ops" / "cpu" / "threads.py"
    answers = []
    for addition in ("", "", "# changed\n"):
        other_file.write_text(other_file.read_text() + addition)
        answers.append(run_python(COMPILED_OR_FOUND, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")))
    assert answers == [[[0, 1, 3], 0], [[0, 1, 3], 1], [[0, 1, 3], 0]]
