"""Promises of the CPU kernels: after a fork, on several threads, without a cache, for tables and values of any kind."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import mmap
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Thread

import numba
import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import tinyexperts
from tinyexperts import PEER, ProductKeyMemory
from tinyexperts.layers import product_key_layer, product_key_router
from tinyexperts.ops import expert_mlp, product_key_topk
from tinyexperts.ops.cpu import compile as cpu_compile
from tinyexperts.ops.cpu import huge_pages
from tinyexperts.ops.cpu import threads as cpu_threads
from tinyexperts.ops.expert_mlp import cpu as expert_mlp_cpu
from tinyexperts.ops.expert_mlp import reference, row_sums
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.ops.expert_mlp.operator import _KERNELS
from tinyexperts.ops.product_key_topk import cpu as topk_cpu
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients

PACKAGE = Path(tinyexperts.__file__).parent
ACTIVATIONS = [(1, None), (2, "gelu"), (2, "relu"), (2, "relu2"), (2, "silu"), (3, "gelu"), (3, "silu")]
SECONDS = 60  # after which something is taken to hang

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="needs fork beside threads, or memory taken only where touched",
)
# From 3.12 on Python warns where a process that has threads forks.
ignore_fork_warning = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@contextlib.contextmanager
def torch_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def two_kernel_threads(monkeypatch):
    """Kernels run on two threads, torch's own operators on one: torch's OpenMP hangs in a child that was forked."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(num_vectors=2, *, num_tokens=131, num_experts=4096, model_dim=64, retrieved=32, dtype=torch.float32):
    """Large enough that every kernel is worth several parts."""
    x = randn(num_tokens, model_dim, seed=1, dtype=dtype)
    experts = randn(num_experts, num_vectors, model_dim, seed=2, dtype=dtype) / 8
    ids = torch.randint(num_experts, (num_tokens, retrieved), generator=torch.Generator().manual_seed(3))
    return x, experts, ids, randn(num_tokens, retrieved, seed=4, dtype=dtype)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return PEER(64, 64**2, **({"num_heads": 4, "experts_per_head": 8, "query_dim": 16} | options))


def dense(tensor):
    return tensor.to_dense() if tensor.is_sparse else tensor


def make_small(kind, num_experts=256, **options):
    torch.manual_seed(0)
    per_head = {"experts_per_head": 6}
    return kind(32, num_experts, num_heads=2, query_dim=8, **per_head, **options)


def forward_and_backward(layer, x):
    """The output and the gradients of x and of every parameter."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(randn(*y.shape, seed=5))
    return [y.detach(), leaf.grad, *(dense(parameter.grad) for parameter in layer.parameters())]


def operator_results(inputs, activation, *, sparse=False, function=expert_mlp):
    """The output, and the gradients of x, table and weights."""
    x, experts, weights = (inputs[i].clone().requires_grad_() for i in (0, 1, 3))
    y = function(x, experts, inputs[2], weights, activation, **({"sparse": True} if sparse else {}))
    y.backward(randn(*y.shape, seed=6, dtype=y.dtype))
    return [y.detach(), torch.zeros_like(x) if x.grad is None else x.grad, experts.grad, weights.grad]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"number {number} differs by up to {(a - b).abs().max()}"


def pool_is_alive():
    """Whether there are helping threads, all of them running."""
    pool = cpu_threads._pool
    return pool is not None and len(pool._threads) > 0 and all(thread.is_alive() for thread in pool._threads)


def in_fork(function):
    """What function returns in a forked child, which must end by itself."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(function()))
    child.start()
    sender.close()
    try:
        assert receiver.poll(SECONDS), "the child hangs"
        result = receiver.recv()
        child.join(SECONDS)
        assert child.exitcode == 0, "the child has its result and doesn't end"
        return result
    finally:
        child.kill()
        child.join()


@linux_only
@ignore_fork_warning
def test_a_forked_child_computes_what_its_parent_did_on_threads_of_its_own(two_kernel_threads):
    layer, x = make(), randn(131, 64)
    expected = forward_and_backward(layer, x)
    assert pool_is_alive()
    arrays, alive = in_fork(lambda: ([t.numpy() for t in forward_and_backward(layer, x)], pool_is_alive()))
    assert alive, "the child has no threads, or those of its parent"
    assert_equal([torch.from_numpy(array) for array in arrays], expected)
    assert pool_is_alive()
    assert_equal(forward_and_backward(layer, x), expected)


@linux_only
@ignore_fork_warning
def test_a_forked_child_that_sets_one_thread_computes_what_its_parent_did_on_two():
    layer, x = make(sparse=True), randn(131, 64)

    def in_child():
        torch.set_num_threads(1)  # as workers of a DataLoader do
        return [t.numpy() for t in forward_and_backward(layer, x)]

    with torch_threads(2):
        expected = forward_and_backward(layer, x)
        assert pool_is_alive()
        got = [torch.from_numpy(array) for array in in_fork(in_child)]
    torch.testing.assert_close(got, expected)  # torch's own products need not have the same bits


@linux_only
@ignore_fork_warning
def test_a_fork_while_another_thread_holds_the_lock_leaves_the_child_free(two_kernel_threads):
    inputs = problem()
    expected = operator_results(inputs, "gelu")
    with cpu_threads._lock:
        arrays = in_fork(lambda: [t.numpy() for t in operator_results(inputs, "gelu")])
    assert_equal([torch.from_numpy(array) for array in arrays], expected)


class OutputsOfALayer(Dataset):
    def __init__(self, layer, inputs):
        self.layer, self.inputs = layer, inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(self.inputs[index]), pool_is_alive(), torch.utils.data.get_worker_info() is not None


@linux_only
@ignore_fork_warning
@pytest.mark.parametrize("kernel_threads", [1, 2])
def test_workers_of_a_data_loader_compute_what_their_parent_does(kernel_threads, monkeypatch):
    dataset = OutputsOfALayer(make().eval(), randn(5, 131, 64))
    expected, _, in_worker = zip(*DataLoader(dataset), strict=True)
    assert not any(in_worker)
    with torch_threads(2):
        forward_and_backward(make(), randn(131, 64))
        assert pool_is_alive()
        if kernel_threads == 2:  # without, workers have one thread
            monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        loader = DataLoader(dataset, num_workers=2, multiprocessing_context="fork", timeout=SECONDS)
        got, alive, in_worker = zip(*loader, strict=True)
    assert all(in_worker)
    assert all(flag == (kernel_threads == 2) for flag in alive), "the parent's threads, or none where some were asked"
    assert_equal(got, expected)


def test_two_python_threads_at_once_compute_what_one_does(two_kernel_threads):
    layers = [make(seed=0), make(seed=1, gated=True, activation="silu", num_heads=2, experts_per_head=16)]
    inputs = [[randn(131, 64, seed=10 * number + step) for step in range(8)] for number in (1, 2)]
    states = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]

    def run(number, barrier):
        results = []
        for x in inputs[number]:
            if barrier:
                barrier.wait(SECONDS)
            results += forward_and_backward(layers[number], x)
        return results + [tensor.clone() for tensor in layers[number].state_dict().values()]

    expected = [run(number, None) for number in (0, 1)]
    for _ in range(3):
        barrier = Barrier(2)
        for layer, state in zip(layers, states, strict=True):
            layer.load_state_dict(state)
        with ThreadPoolExecutor(2) as executor:
            got = list(executor.map(run, (0, 1), (barrier, barrier)))
        for results, reference_results in zip(got, expected, strict=True):
            assert_equal(results, reference_results)


@pytest.fixture
def submits(monkeypatch):
    """Grows by one with every call for a helping thread."""
    seen, threads = [], cpu_threads._threads

    class Counting:
        def __init__(self, pool):
            self.pool = pool

        def submit(self, work):
            seen.append(work)
            return self.pool.submit(work)

    monkeypatch.setattr(cpu_threads, "_threads", lambda count: Counting(threads(count)))
    return seen


def for_each_number_of_threads(submits, function, calls):
    """function() with 1, 2 and 3 threads; with two of them each of its `calls` of a kernel asks for one helper."""
    results = []
    for threads in (1, 2, 3):
        submits.clear()
        with torch_threads(threads):
            results.append(function())
        if threads == 1:
            assert not submits, "one thread needs no helper"
        elif threads == 2:
            assert len(submits) == calls
        else:
            assert calls < len(submits) <= 2 * calls
        assert_equal(results[-1], results[0])


@pytest.mark.parametrize(("num_vectors", "activation"), ACTIVATIONS)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_number_of_threads_is_followed_and_changes_no_bit_of_expert_mlp(submits, num_vectors, activation, sparse):
    inputs = problem(num_vectors)

    def run():
        return [dense(t) for t in operator_results(inputs, activation, sparse=sparse)]

    for_each_number_of_threads(submits, run, calls=3)  # tokens forward, tokens backward, touched rows


# One selection and one for tied rows, or two of them a head; the gradients.
@pytest.mark.parametrize(("shared", "calls"), [(True, 3), (False, 9)])
def test_the_number_of_threads_is_followed_and_changes_no_bit_of_the_retrieval(submits, shared, calls, monkeypatch):
    # The products are torch's own: here always by one thread.
    bmm = torch.bmm

    def on_one_thread(*arguments, out):
        with torch_threads(1):
            bmm(*arguments, out=out)

    monkeypatch.setattr(torch, "bmm", on_one_thread)
    query, keys = randn(131, 4, 16, seed=1), randn(*((2,) if shared else (4, 2)), 300, 8, seed=2)
    keys = (keys * 4).round() / 4  # equal scores, too
    query[:100] = (query[:100] * 4).round() / 4

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in (query, keys)]
        scores, ids = product_key_topk(*leaves, 8)
        scores.backward(randn(*scores.shape, seed=3))
        return scores.detach(), ids, leaves[0].grad, leaves[1].grad

    for_each_number_of_threads(submits, run, calls)


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("num_vectors", [1, 2, 3])
def test_the_number_of_threads_is_followed_and_changes_no_bit_of_the_fused_step(submits, num_vectors, second_moment):
    x, experts, ids, weights = problem(num_vectors)
    activation = None if num_vectors == 1 else "gelu"

    def run():
        table = torch.nn.Parameter(experts.clone())
        optimizer = RowSparseAdam([table], second_moment=second_moment, weight_decay=0.1, fused=True)
        norms = []
        for step in range(3):
            y = expert_mlp(x, table, ids.roll(step), weights, activation, sparse=True)
            table.grad = None
            with deferred_gradients([optimizer]):
                y.backward(randn(*y.shape, seed=step))
            norms += [pending_gradient(table.grad).squared_norm(), clip_gradient_norm_([table], 1.0).double()]
            optimizer.step()
        return [table.detach(), *optimizer.state[table].values(), torch.stack(norms)]

    # Each step: tokens forward, tokens backward, the norm (twice), the update.
    for_each_number_of_threads(submits, run, calls=15)


def test_other_python_threads_follow_the_number_of_threads_too(submits):
    inputs, counts = problem(), []

    def run():
        submits.clear()
        operator_results(inputs, "gelu")
        counts.append(len(submits))

    for threads in (2, 1):
        with torch_threads(threads):
            thread = Thread(target=run)
            thread.start()
            thread.join(SECONDS)
    assert counts == [3, 0]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize(("num_items", "min_items"), [(0, 1), (1, 1), (7, 1), (8, 4), (7, 4), (1000, 3), (97, 96)])
def test_parts_cover_every_item_once(monkeypatch, num_threads, num_items, min_items):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    parts = []
    cpu_threads.parallel_for(lambda *part: parts.append(part), num_items, "first", 2, min_items=min_items)
    assert {part[:2] for part in parts} == {("first", 2)}
    assert sorted(item for part in parts for item in range(*part[2:])) == list(range(num_items))
    assert len(parts) == 1 or min(stop - start for *_, start, stop in parts) >= min_items


def test_a_pool_that_is_busy_holds_nothing_up(two_kernel_threads):
    inputs = problem()
    expected = operator_results(inputs, "gelu")
    release, got = Event(), []
    blockers = [cpu_threads._threads(1).submit(release.wait) for _ in range(cpu_threads._pool_size)]
    try:
        thread = Thread(target=lambda: got.extend(operator_results(inputs, "gelu")))
        thread.start()
        thread.join(SECONDS)
        assert not any(blocker.done() for blocker in blockers)
        assert_equal(got, expected)
    finally:
        release.set()


def product_and_sum(x, out, start, stop):
    """A kernel; Python can run it as well."""
    for i in range(start, stop):
        total = x[i, 0] * x[i, 0]
        for j in range(1, x.shape[1]):
            total += x[i, j] * x[i, j]
        out[i] = total


@pytest.mark.parametrize("name", ["kernel", "exact_kernel"])
def test_a_kernel_that_can_not_be_kept_on_disk_is_compiled_and_computes(name, monkeypatch):
    njit, refused = numba.njit, []

    def refusing(**options):
        def decorate(function):
            if options.pop("cache", False):  # numba says so when it decorates
                refused.append(function)
                raise RuntimeError(f"cannot cache function {function.__name__!r}: no locator available for file 'x.py'")
            return njit(**options)(function)

        return decorate

    monkeypatch.setattr(numba, "njit", refusing)
    compiled = getattr(cpu_compile, name)(product_and_sum)
    assert refused == [product_and_sum]
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
    home = tmp_path / "home"
    home.touch()
    folders = [copy, *(path for path in copy.rglob("*") if path.is_dir())]
    for folder in folders:
        (folder / "__pycache__").touch()  # a file in its place stops root too, whom permissions don't
        folder.chmod(0o555)
    try:
        told = run_python(READ_ONLY, copy.parent, HOME=str(home / "nobody"))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert told == {"package": str(copy / "__init__.py"), "cache": None}
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
    told = [run_python(FIRST_CALLS, PACKAGE.parent, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    for process, answer in zip(("first", "second"), told, strict=True):
        print(f"{process} process, first calls: {answer['seconds']}")
        assert answer["full collections"] == 0
        assert answer["enabled"]
    assert told[0]["hits and misses"] == {"_top_k_of_sums": [0, 1], "_forward": [0, 1]}
    assert told[1]["hits and misses"] == {"_top_k_of_sums": [1, 0], "_forward": [1, 0]}
    assert told[0]["y"] == told[1]["y"]
    assert told[0]["ids"] == told[1]["ids"]


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
starts = row_sums.touched_rows(torch.tensor([[3, 1, 3]]))[2].tolist()
print(json.dumps([starts, sum(row_sums._find_starts.stats.cache_hits.values())]))
"""


@pytest.mark.slow
def test_a_kernel_is_compiled_anew_when_a_function_of_another_file_has_changed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "tinyexperts", ignore=shutil.ignore_patterns("__pycache__"))
    other_file = tmp_path / "tinyexperts" / "ops" / "cpu" / "threads.py"
    told = []
    for addition in ("", "", "# changed\n"):
        other_file.write_text(other_file.read_text() + addition)
        told.append(run_python(COMPILED_OR_FOUND, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")))
    assert told == [[[0, 1, 3], 0], [[0, 1, 3], 1], [[0, 1, 3], 0]]


@pytest.mark.parametrize("kernels", ["cpu", "portable"])
@pytest.mark.parametrize(("num_vectors", "activation"), ACTIVATIONS)
def test_autocast_changes_no_bit_of_expert_mlp_and_its_gradients(kernels, num_vectors, activation, monkeypatch):
    if kernels == "portable":
        monkeypatch.delitem(_KERNELS, "cpu")
    inputs = problem(num_vectors, num_tokens=9, num_experts=50, model_dim=33, retrieved=6)
    expected = operator_results(inputs, activation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = operator_results(inputs, activation)
    assert_equal(got, expected)


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
def test_autocast_around_a_layer_changes_no_bit_of_its_operators(kind, monkeypatch):
    calls = []

    def recorded(module, name):
        function = getattr(module, name)

        def call(*arguments, **options):
            result = function(*arguments, **options)
            calls.append((function, arguments, options, result))
            return result

        monkeypatch.setattr(module, name, call)

    recorded(product_key_router, "product_key_topk")
    recorded(product_key_layer, "expert_mlp")
    layer = make_small(kind, sparse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(randn(9, 32))
    assert len(calls) == 2
    assert calls[0][1][0].dtype == torch.bfloat16, "autocast was on: the query network's output is narrow"
    assert calls[0][3][0].dtype == torch.float32, "scores are not"
    for function, arguments, options, result in calls:
        expected = function(*arguments, **options)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (result, expected)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
def test_a_fused_step_after_autocast_equals_the_one_without_it_to_the_bit(kind):
    results = []
    for fused in (False, True):
        layer = make_small(kind, sparse=True)
        optimizer = RowSparseAdam([layer.experts], lr=0.1, fused=fused)
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = layer(randn(40, 32, seed=step, dtype=torch.bfloat16).requires_grad_())
            assert y.dtype == torch.bfloat16
            with deferred_gradients([optimizer]):
                y.float().square().sum().backward()
            assert (pending_gradient(layer.experts.grad) is not None) == fused
            optimizer.step()
            optimizer.zero_grad()
        results.append([layer.experts.detach(), *optimizer.state[layer.experts].values()])
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_fused_step_under_activation_checkpointing_gives_the_same_weights(kind, use_reentrant, passes):
    def run(forward):
        layer = make_small(kind, sparse=True)
        optimizer = RowSparseAdam([layer.experts], lr=0.1, fused=True)
        rest = torch.optim.SGD(layer.router.parameters(), lr=0.1)
        for step in range(3):
            for micro_batch in range(passes):
                leaf = randn(40, 32, seed=2 * step + micro_batch).requires_grad_()
                with deferred_gradients([optimizer]):
                    forward(layer, leaf).square().sum().backward()
            assert (pending_gradient(layer.experts.grad) is not None) == (passes == 1)
            for chosen in (optimizer, rest):
                chosen.step()
                chosen.zero_grad()
        return [*layer.state_dict().values(), *optimizer.state[layer.experts].values()]

    expected = run(lambda layer, x: layer(x))
    assert not torch.equal(expected[0], run(lambda layer, x: layer(x) * 2)[0])
    assert_equal(run(lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant)), expected)


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_layer_on_meta_has_shapes_and_calls_no_kernel(kind, sparse, monkeypatch):
    def called(*arguments, **options):
        raise AssertionError("a kernel was called")

    with monkeypatch.context() as patch:
        for module in (expert_mlp_cpu, topk_cpu):
            patch.setattr(module, "parallel_for", called)
        large = kind(1024, 1024**2, sparse=sparse, device="meta")  # 4 or 8 GiB, were it anywhere
        for x in (torch.empty(3, 5, 1024, device="meta"), torch.empty(0, 1024, device="meta")):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    y = large(x)
                assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.float32, "meta")
                routing = large.route(x)
                assert routing.ids.shape == routing.scores.shape == (*x.shape[:-1], *routing.ids.shape[-2:])
        with pytest.raises(AssertionError, match="a kernel was called"):
            make_small(kind)(randn(9, 32))
    layer, twin = make_small(kind, sparse=sparse, device="meta").to_empty(device="cpu"), make_small(kind, sparse=sparse)
    for module in (layer, twin):
        module.reset_parameters(torch.Generator().manual_seed(7))
    x = randn(9, 32)
    assert_equal(forward_and_backward(layer, x), forward_and_backward(twin, x))
    assert layer(x).isfinite().all()
    assert layer(x).any()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@linux_only
@pytest.mark.parametrize("fused", [False, True])
def test_a_table_of_more_than_2_to_31_elements_is_read_and_trained_at_its_end(fused):
    num_experts, dim = 2**23 + 3, 257
    before = resident_bytes()
    try:
        table = torch.from_numpy(np.zeros((num_experts, 1, dim), dtype=np.float32)).requires_grad_()
        optimizer = RowSparseAdam([table], lr=0.5, second_moment="row", fused=fused)
    except MemoryError:
        pytest.skip("no 8 GiB of addresses")
    assert table.numel() > 2**31
    # Six rows: the first and the last ones, one on each side of element 2^31, and one that all tokens share.
    middle = 2**31 // dim
    rows = torch.tensor([0, middle - 1, middle + 1, num_experts - 3, num_experts - 2, num_experts - 1])
    values = randn(6, dim, seed=1)
    with torch.no_grad():
        table[rows, 0] = values
    # Token m retrieves rows m, m + 1, ... of the six, and the last one.
    chosen = torch.stack([(torch.arange(4) + token) % 6 for token in range(5)] + [torch.full((4,), 5)])
    weights, grad = randn(6, 4, seed=2), randn(6, dim, seed=3)
    x = torch.zeros(6, dim)
    try:
        y = expert_mlp(x, table, rows[chosen], weights, None, sparse=True)
        with deferred_gradients([optimizer]):
            y.backward(grad)
        one_hot_MC = torch.zeros(6, 6, dtype=torch.float64).scatter_add_(1, chosen, weights.double())
        torch.testing.assert_close(y.double(), one_hot_MC @ values.double(), rtol=1e-5, atol=1e-5)
        expected = (one_hot_MC.T @ grad.double()).float()
        if not fused:
            assert torch.equal(table.grad._indices()[0], rows)
            torch.testing.assert_close(table.grad._values()[:, 0], expected, rtol=1e-5, atol=1e-5)
        optimizer.step()
    except MemoryError:
        pytest.skip("no 16 GiB of addresses")
    # The first step of Adam, with one second moment a row, goes along the gradient, whose mean square it makes one.
    step = expected / expected.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(table.detach()[rows, 0], values - 0.5 * step, rtol=1e-4, atol=1e-4)
    neighbours = torch.tensor([1, middle - 2, middle, middle + 2, num_experts - 4])
    assert not table.detach()[neighbours].any()
    # A touched row may bring in a huge page of 2 MiB, in the table and its moments.
    assert resident_bytes() - before < 200 * 2**20


@linux_only
def test_the_last_of_more_than_2_to_31_retrieved_experts_are_summed():
    # The kernels themselves, for the last two tokens: the other pages of these arrays are never touched.
    num_retrieved, num_tokens = 2**16, 2**15 + 3
    assert (num_tokens - 2) * num_retrieved > 2**31
    shape = (num_tokens, num_retrieved)
    try:
        ids_MP, weights_MP = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        pre_FMP, coefficient_MP = np.zeros((1, *shape), dtype=np.float32), np.zeros(shape, dtype=np.float32)
        grad_weights_MP, factors_EMP = np.zeros(shape, dtype=np.float32), np.zeros((2, *shape), dtype=np.float32)
    except MemoryError:
        pytest.skip("no 64 GiB of addresses")
    last = slice(num_tokens - 2, num_tokens)
    x, grad_y, experts = randn(num_tokens, 5, seed=1), randn(num_tokens, 5, seed=2), randn(7, 2, 5, seed=3)
    ids, weights = (
        torch.randint(7, (2, num_retrieved), generator=torch.Generator().manual_seed(4)),
        randn(2, num_retrieved, seed=5),
    )
    ids_MP[last], weights_MP[last] = ids, weights
    y, grad_x = np.zeros(x.shape, dtype=np.float32), np.zeros(x.shape, dtype=np.float32)
    no_scales, constants = np.zeros((0, 0), dtype=np.float32), expert_mlp_cpu._constants(torch.float32)
    expert_mlp_cpu._forward(
        x.numpy(), experts.numpy(), ids_MP, weights_MP, no_scales, 2, constants, y, pre_FMP, last.start, last.stop
    )
    leaves = [t.clone().requires_grad_() for t in (x[last], experts, weights)]
    expected, _ = reference.expert_mlp(leaves[0], leaves[1], ids, leaves[2], "relu")
    expected.backward(grad_y[last])
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-2)  # of sums of 65,536 numbers
    close(torch.from_numpy(y[last]), expected.detach())
    assert not y[: last.start].any()

    coefficient_MP[last] = np.maximum(pre_FMP[0, last], 0)
    pre_FMP[0, last] = pre_FMP[0, last] > 0  # the derivative of ReLU
    expert_mlp_cpu._backward(
        grad_y.numpy(), experts.numpy(), ids_MP, weights_MP, coefficient_MP, pre_FMP, no_scales, constants,
        grad_x, grad_weights_MP, factors_EMP, last.start, last.stop,
    )  # fmt: skip
    close(torch.from_numpy(grad_x[last]), leaves[0].grad)
    close(torch.from_numpy(grad_weights_MP[last]), leaves[2].grad)
    rows, order, starts = row_sums.touched_rows(ids)
    order += last.start * num_retrieved
    grad_rows = row_sums.sum_touched_rows(order, starts, torch.from_numpy(factors_EMP), x, grad_y)
    close(grad_rows, leaves[1].grad[rows])


@pytest.mark.parametrize(("num_vectors", "activation"), ACTIVATIONS[1:])
@pytest.mark.parametrize("broken", [[0], [2, 130]])
def test_nan_in_a_token_stays_in_its_outputs_and_its_experts(num_vectors, activation, broken, two_kernel_threads):
    inputs = problem(num_vectors)
    expected = operator_results(inputs, activation)
    x = inputs[0].clone()
    x[broken, 5] = torch.nan
    y, grad_x, grad_experts, grad_weights = operator_results((x, *inputs[1:]), activation)
    fine = torch.ones(len(x), dtype=torch.bool)
    fine[broken] = False
    assert y[broken].isnan().all()
    for got, plain in ((y, expected[0]), (grad_x, expected[1]), (grad_weights, expected[3])):
        assert torch.equal(got[fine], plain[fine])
    assert grad_weights[broken].isnan().all()
    untouched = torch.ones(len(inputs[1]), dtype=torch.bool)
    untouched[inputs[2][broken].flatten()] = False
    assert torch.equal(grad_experts[untouched], expected[2][untouched])
    assert grad_experts[~untouched].isnan().any((1, 2)).all()


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
@pytest.mark.parametrize("num_sub_keys", [16, 256])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_leaves_the_other_tokens_of_a_layer_alone(
    kind, num_sub_keys, value, two_kernel_threads
):
    layer, x = make_small(kind, num_sub_keys**2, query_norm="layer"), randn(70, 32)
    expected = forward_and_backward(layer, x)[0]
    x[3, 2] = x[69, 0] = value
    got = forward_and_backward(layer, x)
    fine = torch.ones(70, dtype=torch.bool)
    fine[[3, 69]] = False
    assert got[0][~fine].isnan().all()
    assert torch.equal(got[0][fine], expected[fine])
    assert got[1][fine].isfinite().all()


@pytest.mark.parametrize(("num_vectors", "activation"), [(1, None), (2, "gelu"), (3, "silu")])
@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_no_tokens_or_no_experts_give_zeros_and_empty_gradients(num_vectors, activation, num_tokens, threads):
    retrieved = 0 if num_tokens else 4
    inputs = problem(num_vectors, num_tokens=num_tokens, num_experts=7, model_dim=5, retrieved=retrieved)
    with torch_threads(threads):
        for sparse in (False, True):
            y, grad_x, grad_experts, grad_weights = operator_results(inputs, activation, sparse=sparse)
            assert torch.equal(y, torch.zeros(num_tokens, 5))
            assert torch.equal(grad_x, torch.zeros(num_tokens, 5))
            assert grad_weights.shape == (num_tokens, retrieved)
            assert grad_experts.shape == (7, num_vectors, 5)
            assert grad_experts.is_sparse == sparse
            assert not dense(grad_experts).any()
            assert not sparse or grad_experts._nnz() == 0


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_empty_batch_leaves_a_fused_table_as_it_is(second_moment, threads):
    layer = make(sparse=True)
    optimizer = RowSparseAdam([layer.experts], second_moment=second_moment, weight_decay=0.1, fused=True)
    before = layer.experts.detach().clone()
    with torch_threads(threads):
        x = torch.zeros(0, 64, requires_grad=True)
        y = layer(x)
        with deferred_gradients([optimizer]):
            y.sum().backward()
        assert y.shape == x.grad.shape == (0, 64)
        assert pending_gradient(layer.experts.grad) is not None
        assert clip_gradient_norm_([layer.experts], 1.0) == 0
        optimizer.step()
    assert torch.equal(layer.experts, before)
    assert not any(optimizer.state[layer.experts][name].any() for name in ("exp_avg", "exp_avg_sq"))


def strided(tensor):
    """The same values, in every other place of a larger tensor whose dimensions lie the other way round."""
    dims = tuple(reversed(range(tensor.dim())))
    room = torch.full([2 * size for size in tensor.permute(dims).shape], 77).to(tensor.dtype)
    view = room[tuple(slice(1, None, 2) for _ in dims)].permute(dims)
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view


@pytest.mark.parametrize("which", [0, 1, 2, 3, "grad", "all"])
@pytest.mark.parametrize(("num_vectors", "activation"), [(1, None), (2, "gelu"), (3, "silu")])
def test_inputs_that_are_not_contiguous_equal_contiguous_ones(which, num_vectors, activation):
    inputs = problem(num_vectors, num_tokens=9, num_experts=50, model_dim=37, retrieved=6)
    grad, results = randn(9, 37, seed=6), []
    for change in (False, True):
        tensors = [strided(t) if change and which in (i, "all") else t.clone() for i, t in enumerate(inputs)]
        x, experts, ids, weights = (t.requires_grad_(t.is_floating_point()) for t in tensors)
        y = expert_mlp(x, experts, ids, weights, activation)
        y.backward(strided(grad) if change and which in ("grad", "all") else grad)
        results.append([y.detach(), *(t.grad for t in (x, experts, weights) if t.grad is not None)])
    assert_equal(results[1], results[0])


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MIXED = [  # the types of x, table and weights
    (torch.float64, torch.float32, torch.float32),
    (torch.float64, torch.bfloat16, torch.float64),
    (torch.float32, torch.float64, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda dtypes: "-".join(str(t).removeprefix("torch.") for t in dtypes))
@pytest.mark.parametrize(("num_vectors", "activation"), [(1, None), (2, "gelu"), (3, "silu")])
def test_operands_of_different_types_equal_the_formula_in_double_precision(dtypes, num_vectors, activation):
    inputs = problem(num_vectors, num_tokens=19, num_experts=50, model_dim=37, retrieved=6, dtype=torch.float64)
    narrow = [t.to(dtype) for t, dtype in zip((inputs[0], inputs[1], inputs[3]), dtypes, strict=True)]
    results = []
    for wide in (False, True):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in narrow]
        function = reference.expert_mlp if wide else expert_mlp
        y = function(leaves[0], leaves[1], inputs[2], leaves[2], activation)
        y = y[0] if wide else y
        y.backward(randn(19, 37, seed=6, dtype=dtypes[0]).to(y.dtype))
        results.append([y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)])
    computed_in = 1e-12 if torch.float64 in dtypes[:2] else 1e-5
    for got, expected in zip(*results, strict=True):
        tolerance = max(computed_in, TOLERANCE[got.dtype])
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert [t.dtype for t in results[0]] == [dtypes[0], *dtypes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_as_it_is(dtype):
    table = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(2**16, 1, 1)
    ids, weights = torch.arange(2**16)[:, None], torch.ones(2**16, 1)
    y = expert_mlp(torch.zeros(2**16, 1), table, ids, weights, None)
    expected = table.float().view(-1, 1)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7, torch.inf, -torch.inf), expected.nan_to_num(7, torch.inf, -torch.inf))


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
