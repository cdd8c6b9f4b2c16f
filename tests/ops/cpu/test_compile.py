"""Kernels are compiled, whatever becomes of what numba keeps of them on disk."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

import tinyexperts
from tinyexperts.errors import InputError
from tinyexperts.ops.cpu import compile as cpu_compile
from tinyexperts.ops.cpu import kernel_cache

SOURCE = '''
def added(x, out):
    """A kernel; Python can run it as well."""
    for i in range(len(x)):
        out[i] = x[i] + 1
'''


@pytest.fixture
def make_kernel(tmp_path, monkeypatch):
    """A function that makes the same kernel again, as another process would, whose cache is in a folder of its own."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "added.py"
    path.write_text(SOURCE)
    kernel_cache._warn_once.cache_clear()

    def make():
        spec = importlib.util.spec_from_file_location("added", path)
        module = importlib.util.module_from_spec(spec)
        # numba imports it by name when it reads an entry whose function nobody holds any more.
        monkeypatch.setitem(sys.modules, "added", module)
        spec.loader.exec_module(module)
        return cpu_compile.kernel(module.added)

    return make


def call(kernel, dtype=np.float32):
    """Call it; returns (from the cache, compiled)."""
    x, out = np.arange(5, dtype=dtype), np.zeros(5, dtype=dtype)
    kernel(x, out)
    assert out.tolist() == [1, 2, 3, 4, 5]
    return sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())


def entries(tmp_path, suffix):
    return sorted((tmp_path / "cache").rglob(f"*.{suffix}"))


DAMAGES = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "garbage": lambda data: bytes(range(256)) * 4,
    "another pickle": lambda data: b"\x80\x04N.",
    "one bit changed": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}
# Of the index: that of another version of numba, a key that is found no more, and a digest that only entries need.
HARMLESS = ["another pickle", "one bit changed", "one byte short"]


CASES = [("nbc", name) for name in DAMAGES] + [("nbi", name) for name in DAMAGES if name not in HARMLESS]


@pytest.mark.parametrize(("suffix", "damage"), CASES)
def test_a_damaged_entry_gives_a_warning_and_is_compiled_again_and_replaced(make_kernel, tmp_path, suffix, damage):
    assert call(make_kernel()) == (0, 1)
    assert call(make_kernel()) == (1, 0)
    (path,) = entries(tmp_path, suffix)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert call(make_kernel()) == (0, 1)
    assert [str(each.message) for each in caught] == [
        f"a compiled kernel in {path.parent} is damaged and is compiled again"
    ]
    assert call(make_kernel()) == (1, 0)


@pytest.mark.parametrize("damage", HARMLESS)
def test_an_index_without_the_entry_or_its_own_last_byte_needs_no_word(make_kernel, tmp_path, damage):
    call(make_kernel())
    (path,) = entries(tmp_path, "nbi")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    call(make_kernel())
    assert call(make_kernel()) == (1, 0)


def test_a_damaged_entry_leaves_the_others(make_kernel, tmp_path):
    for dtype in (np.float32, np.float64):
        call(make_kernel(), dtype)
    _, second = entries(tmp_path, "nbc")
    second.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged and is compiled again"):
        assert call(make_kernel(), np.float64) == (0, 1)
    assert call(make_kernel(), np.float32) == (1, 0)
    assert call(make_kernel(), np.float64) == (1, 0)


def test_a_missing_entry_is_compiled_again(make_kernel, tmp_path):
    for suffix in ("nbc", "nbi"):
        call(make_kernel())
        (path,) = entries(tmp_path, suffix)
        path.unlink()
        assert call(make_kernel()) == (0, 1)
        assert call(make_kernel()) == (1, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_gives_one_warning(make_kernel, tmp_path, monkeypatch, number):
    def full(*arguments):
        raise OSError(number, os.strerror(number), "x.tmp.1234")

    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_open_for_write", full)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kernel = make_kernel()
            assert call(kernel) == (0, 1)
            call(kernel, np.float64)
            assert call(make_kernel()) == (0, 1)
    folder = Path(kernel.stats.cache_path)
    assert [str(each.message) for each in caught] == [
        f"compiled kernels can't be kept in {folder} ({os.strerror(number)}): each process compiles them again"
    ]
    assert call(make_kernel()) == (0, 1)
    assert call(make_kernel()) == (1, 0)


def test_a_disk_that_is_full_in_the_middle_of_an_entry_leaves_none(make_kernel, tmp_path, monkeypatch):
    save_data = IndexDataCacheFile._save_data

    def half(self, name, data):
        Path(self._cache_path, f"{name}.tmp.1").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexDataCacheFile, "_save_data", half)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert call(make_kernel()) == (0, 1)
    monkeypatch.setattr(IndexDataCacheFile, "_save_data", save_data)
    assert call(make_kernel()) == (0, 1)
    assert call(make_kernel()) == (1, 0)


def test_an_entry_that_can_not_be_read_gives_a_warning(make_kernel, tmp_path):
    call(make_kernel())
    (path,) = entries(tmp_path, "nbi")
    path.unlink()
    path.mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert call(make_kernel()) == (0, 1)
    assert [str(each.message) for each in caught] == [
        f"compiled kernels in {path.parent} can't be read (Is a directory) and are compiled again",
        f"compiled kernels can't be kept in {path.parent} (Is a directory): each process compiles them again",
    ]


def run(script, *, before="", **environment):
    """Return what a fresh Python prints for a script, read as JSON, and what it writes to stderr."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTHONWARNINGS"))}
    base["PYTHONPATH"] = str(Path(tinyexperts.__file__).parents[1])
    command = [sys.executable, "-c", textwrap.dedent(before) + script]
    done = subprocess.run(command, env=base | environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


ONE_KERNEL = """
import json, torch
from tinyexperts.ops.expert_mlp import row_sums
starts = row_sums.find_touched_rows(torch.tensor([[3, 1, 3]]))[2].tolist()
print(json.dumps([starts, sum(row_sums._find_starts.stats.cache_hits.values())]))
"""


def test_a_process_that_may_not_write_files_of_that_size_continues(tmp_path):
    """Importing makes empty files; the first bytes are refused when the kernel is called."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    printed, said = run(ONE_KERNEL, before=limit, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == [[0, 1, 3], 0]
    assert said.count("UserWarning: compiled kernels can't be kept in ") == said.count("UserWarning") == 1
    assert "(File too large): each process compiles them again" in said
    assert not list(tmp_path.rglob("*.tmp.*"))


TRAINED = """
import torch
from tinyexperts import PEER
from tinyexperts.optim import build_optimizers, clip_gradient_norm_, deferred_gradients
results = []
for sparse in (False, True):
    torch.manual_seed(0)
    layer = PEER(16, 49, num_heads=2, experts_per_head=3, query_dim=4, gated=True, sparse=sparse, dtype=torch.float64)
    rates = dict.fromkeys(("matrix_lr", "embedding_lr", "head_lr", "vector_lr", "table_lr"), 0.01)
    optimizers = build_optimizers(layer, sparse_tables=sparse, **rates)
    for step in range(3):
        with deferred_gradients(optimizers):
            layer(torch.randn(20, 16, dtype=torch.float64)).square().sum().backward()
        clip_gradient_norm_(layer.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    results += [parameter.tolist() for parameter in layer.parameters()]
"""


@pytest.mark.slow
def test_without_numbas_compiler_layers_train_too_and_one_warning_says_so():
    slow, said = run(TRAINED + "import json\nprint(json.dumps(results))", NUMBA_DISABLE_JIT="1")
    fast = {}
    exec(TRAINED, fast)  # here, where kernels are compiled: a warning would be an error
    for got, expected in zip(slow, fast["results"], strict=True):
        np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-9, atol=1e-12)
    assert said.count("NUMBA_DISABLE_JIT is set, so that the CPU's kernels can't be compiled") == 1


def test_a_kernel_that_is_not_compiled_refuses_and_keeps_its_name(monkeypatch):
    monkeypatch.setattr(cpu_compile, "JIT_IS_DISABLED", True)

    def added(x, out):
        """A kernel."""

    for make in (cpu_compile.kernel, cpu_compile.exact_kernel):
        refusing = make(added)
        assert refusing.__name__ == "added"
        with pytest.raises(InputError, match="got NUMBA_DISABLE_JIT: unset it"):
            refusing(1, 2)
