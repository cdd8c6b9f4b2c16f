"""The CPU's kernels give the same bits after a fork and for any number of threads."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import pytest
import torch
from operands import (
    SEVERAL_PARTS,
    assert_equal,
    dense,
    layer_results,
    make_layer,
    operator_results,
    problem,
    randn,
)
from torch.utils.data import DataLoader, Dataset

from tinyexperts.bench.measurement import torch_threads
from tinyexperts.ops import expert_mlp, product_key_topk
from tinyexperts.ops.cpu import threads as cpu_threads
from tinyexperts.ops.expert_mlp.deferred import pending_gradient
from tinyexperts.optim import RowSparseAdam, clip_gradient_norm_, deferred_gradients

ACTIVATIONS = [(1, None), (2, "gelu"), (2, "relu"), (2, "relu2"), (2, "silu"), (3, "gelu"), (3, "silu")]
SECONDS = 60  # after which something is taken to hang

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork in a process with threads")
# From 3.12 on Python warns where a process that has threads forks.
ignore_fork_warning = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def pool_is_alive():
    """Whether there are helping threads, all of them running."""
    pool = cpu_threads._pool
    return pool is not None and len(pool._threads) > 0 and all(thread.is_alive() for thread in pool._threads)


def in_fork(function):
    """Return the function's result in a forked child, which must end without a signal."""
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
    layer, x = make_layer(), randn(131, 64)
    expected = layer_results(layer, x)
    assert pool_is_alive()
    arrays, alive = in_fork(lambda: ([t.numpy() for t in layer_results(layer, x)], pool_is_alive()))
    assert alive, "the child has no threads, or those of its parent"
    assert_equal([torch.from_numpy(array) for array in arrays], expected)
    assert pool_is_alive()
    assert_equal(layer_results(layer, x), expected)


@linux_only
@ignore_fork_warning
def test_a_forked_child_that_sets_one_thread_computes_what_its_parent_did_on_two():
    layer, x = make_layer(sparse=True), randn(131, 64)

    def in_child():
        torch.set_num_threads(1)  # as workers of a DataLoader do
        return [t.numpy() for t in layer_results(layer, x)]

    with torch_threads(2):
        expected = layer_results(layer, x)
        assert pool_is_alive()
        got = [torch.from_numpy(array) for array in in_fork(in_child)]
    torch.testing.assert_close(got, expected)  # torch's own products need not have the same bits


@linux_only
@ignore_fork_warning
def test_a_fork_while_another_thread_holds_the_lock_leaves_the_child_free(two_kernel_threads):
    inputs = problem(**SEVERAL_PARTS)
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
    dataset = OutputsOfALayer(make_layer().eval(), randn(5, 131, 64))
    expected, _, in_worker = zip(*DataLoader(dataset), strict=True)
    assert not any(in_worker)
    with torch_threads(2):
        layer_results(make_layer(), randn(131, 64))
        assert pool_is_alive()
        if kernel_threads == 2:  # without, workers have one thread
            monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        loader = DataLoader(dataset, num_workers=2, multiprocessing_context="fork", timeout=SECONDS)
        got, alive, in_worker = zip(*loader, strict=True)
    assert all(in_worker)
    assert all(flag == (kernel_threads == 2) for flag in alive), "the parent's threads, or none where some were asked"
    assert_equal(got, expected)


def test_two_python_threads_at_once_compute_what_one_does(two_kernel_threads):
    layers = [make_layer(seed=0), make_layer(seed=1, gated=True, activation="silu", num_heads=2, experts_per_head=16)]
    inputs = [[randn(131, 64, seed=10 * number + step) for step in range(8)] for number in (1, 2)]
    states = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]

    def run(number, barrier):
        results = []
        for x in inputs[number]:
            if barrier:
                barrier.wait(SECONDS)
            results += layer_results(layers[number], x)
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
    inputs = problem(num_vectors, **SEVERAL_PARTS)

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
    x, experts, ids, weights = problem(num_vectors, **SEVERAL_PARTS)
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
    inputs, counts = problem(**SEVERAL_PARTS), []

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
    inputs = problem(**SEVERAL_PARTS)
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
