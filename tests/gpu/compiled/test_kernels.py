"""What compilers make of the product's kernels: they compile, nothing spills, rows are loaded 16 bytes at a time."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from tinyexperts.ops.expert_mlp import gpu as experts_gpu  # noqa: E402
from tinyexperts.ops.expert_mlp import gpu_sums  # noqa: E402
from tinyexperts.ops.expert_mlp.sorted_pairs import sort_pairs  # noqa: E402
from tinyexperts.ops.gpu.launch import MAX_REGISTERS, launch_for  # noqa: E402
from tinyexperts.ops.product_key_topk import gpu as topk_gpu  # noqa: E402
from tinyexperts.ops.row_adam import fused_gpu  # noqa: E402
from tinyexperts.ops.row_adam import gpu as adam_gpu  # noqa: E402

TYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "4 bits": torch.uint8,
}
CONSTANTS = (0.1, 0.9, 0.99, 1e-8, 0.1, 3)
SEED = 2**32 - 1
AMD_REGISTERS = 256
# On sm_100 ptxas puts an address aside in two variants, though at most 48 registers are taken: 8 bytes of a lane, moved
# by up to five instructions.
BYTES_ASIDE, MOVES_ASIDE = {"sm_100": 8}, 5


def table_of(storage, num_vectors, dim):
    """A table of 64 experts, its scales, and the type of the tokens that go with it."""
    table = torch.zeros(64, num_vectors, (dim + 1) // 2 if storage == "4 bits" else dim, dtype=TYPES[storage])
    scales = {
        "int8": torch.zeros(64, num_vectors),
        "4 bits": torch.zeros(64, num_vectors, (dim + 31) // 32, dtype=torch.bfloat16),
    }
    return table, scales.get(storage), TYPES[storage] if storage in ("bf16", "fp16") else torch.float32


def launch_experts(storage, num_vectors, dim, num_tokens=4096, retrieved=128):
    """Launch the forward and the backward pass."""
    table, scales, dtype = table_of(storage, num_vectors, dim)
    x = torch.zeros(num_tokens, dim, dtype=dtype)
    ids = torch.zeros(num_tokens, retrieved, dtype=torch.int64)
    weights = torch.zeros(num_tokens, retrieved)
    activation = None if num_vectors == 1 else "gelu"
    pre = torch.zeros(num_vectors - 1, num_tokens, retrieved)
    forward = (x, table, ids, weights, activation, scales)
    run(experts_gpu.EXPERT_MLP, *forward)
    run(experts_gpu.EXPERT_MLP_BACKWARD, x, x, table, ids, weights, pre, activation, scales)


def launch_sums(storage, num_vectors, dim, num_tokens=16, retrieved=8, *, all_uses=True):
    """Launch the dense gradient and Adam, or all that sums by expert, and the update of given rows."""
    table, _, dtype = table_of(storage, num_vectors, dim)
    x = torch.zeros(num_tokens, dim, dtype=dtype)
    ids = torch.zeros(num_tokens, retrieved, dtype=torch.int64)
    factors = torch.zeros(num_vectors, num_tokens, retrieved)
    run(gpu_sums.DENSE_GRADIENT, ids, factors, x, x, table)
    if all_uses:
        run(gpu_sums.GRADIENT_ROWS, ids, factors, x, x, table)
        run(gpu_sums.SQUARED_NORM, *sort_pairs(ids), factors, x, x)
    for second in (torch.zeros(table.shape), torch.zeros(table.shape[:2]))[: 2 if all_uses else 1]:
        moments = torch.zeros(table.shape), second
        run(fused_gpu.ROW_ADAM_FUSED, table, *moments, *sort_pairs(ids), factors, x, x, *CONSTANTS)
        run(adam_gpu.ROW_ADAM, table, *moments, torch.arange(5), table[:5], *CONSTANTS)
        if table.dtype == torch.bfloat16:
            run(fused_gpu.ROW_ADAM_FUSED, table, *moments, *sort_pairs(ids), factors, x, x, *CONSTANTS, SEED)
            run(adam_gpu.ROW_ADAM, table, *moments, torch.arange(5), table[:5], *CONSTANTS, SEED)


def launch_retrieval(num_sub_keys, k, num_tokens=8, num_heads=2, half=32, *, shared=True):
    """Launch both passes of retrieval."""
    query = torch.zeros(num_tokens, num_heads, 2 * half)
    keys = torch.zeros(*(() if shared else (num_heads,)), 2, num_sub_keys, half)
    run(topk_gpu.PRODUCT_KEY_TOPK, query, keys, k)
    ids = torch.zeros(num_tokens, num_heads, k, dtype=torch.int64)
    run(topk_gpu.PRODUCT_KEY_TOPK_BACKWARD, ids.float(), ids, query, keys)


def run(kernel, *operands):
    kernel.run(kernel.plan(*operands), *operands)


def check(found):
    """Nothing spills, registers are as few as the table of launches takes them to be, and grids are possible."""
    assert found
    for launch in found:
        is_amd = launch.target.startswith("gfx")
        puts_aside = launch.code.spilled_bytes == BYTES_ASIDE.get(launch.target)
        assert launch.code.spills <= (MOVES_ASIDE if puts_aside else 0), launch
        assert launch.code.registers <= (AMD_REGISTERS if is_amd else MAX_REGISTERS), launch
        assert 1 <= launch.grid[0] < 2**31
        assert max(launch.grid[1:]) <= 65535


EACH_TARGET = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Storage, vectors, D: each kind of table and of expert once; D that no power of two is, as wide as a program holds.
VARIANTS = [
    ("fp32", 1, 256),
    ("fp32", 2, 1024),
    ("fp32", 3, 256),
    ("bf16", 1, 7),
    ("bf16", 3, 8192),
    ("fp16", 2, 100),
    ("int8", 2, 1024),
    ("4 bits", 3, 4096),
]


@pytest.mark.parametrize("target", EACH_TARGET)
def test_kernels_compile_for_each_target(launches, target):
    found = launches(target)
    launch_experts("bf16", 2, 256)
    launch_sums("bf16", 2, 256, all_uses=False)
    launch_retrieval(1024, 16)
    check(found)
    names = {"forward", "backward", "sum_tiles", "add_parts", "update_rows", "select", "pairs"}
    assert {launch.kernel for launch in found} == names


@pytest.mark.parametrize(("storage", "num_vectors", "dim"), VARIANTS)
def test_the_experts_kernels_at_all_kinds_of_sizes(launches, storage, num_vectors, dim):
    found = launches("sm_90")
    launch_experts(storage, num_vectors, dim)
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "num_vectors", "dim"), [("fp32", 3, 1024), ("bf16", 1, 100)])
def test_the_sums_at_all_kinds_of_sizes(launches, storage, num_vectors, dim):
    found = launches("sm_90")
    launch_sums(storage, num_vectors, dim)
    check(found)


@pytest.mark.parametrize(("num_sub_keys", "k", "shared"), [(1, 1, True), (100, 4, False), (1000, 32, True)])
def test_retrieval_at_all_kinds_of_sizes(launches, num_sub_keys, k, shared):
    found = launches("sm_90")
    launch_retrieval(num_sub_keys, k, shared=shared)
    check(found)


def test_sizes_of_one_are_taken_as_constants(launches):
    found = launches("sm_90")
    launch_experts("fp32", 3, 1, num_tokens=1, retrieved=1)
    launch_sums("fp32", 3, 1, num_tokens=1, retrieved=1, all_uses=False)
    launch_retrieval(1, 1, num_tokens=1, num_heads=1, half=1)
    check(found)


@pytest.mark.parametrize(("storage", "bytes_each"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("dim", [256, 1000])
def test_rows_are_loaded_16_bytes_at_a_time(launches, storage, bytes_each, dim):
    found = launches("sm_90")
    launch_experts(storage, 2, dim)
    launch = launch_for(dim, num_vectors=2)
    # For a lane: its part of a row, by the rows that are loaded together and the vectors of an expert.
    wanted = launch.rows * 2 * math.ceil(launch.block * bytes_each / (32 * launch.warps * 16))
    for each in found:
        assert each.code.global_loads()[16] >= wanted, each
        assert each.code.global_loads()[1] == each.code.global_loads()[2] == 0
    found.clear()
    launch_sums(storage, 2, dim, all_uses=False)
    sums = [each for each in found if each.kernel == "sum_tiles"]
    assert len(sums) == (3 if storage == "bf16" else 2)  # also with stochastic rounding
    for each in sums:
        # fp32 sums have four neighbours a lane: 16 bytes of fp32 tokens, 8 of bf16.
        assert each.code.global_loads()[4 * bytes_each] >= 2
        assert each.code.global_loads()[2] == 0


def test_ids_are_checked_on_the_device_in_debug_mode(launches, monkeypatch):
    texts = []
    for debug in (False, True):
        monkeypatch.setattr(triton.knobs.runtime, "debug", debug)
        found = launches("sm_90")
        launch_experts("fp32", 2, 64)
        launch_sums("fp32", 2, 64, all_uses=False)
        texts.append({each.kernel: each.files["ptx"].read_text() for each in found})
    for kernel in ("forward", "backward", "update_rows"):
        assert "must be between 0 and N - 1" not in texts[0][kernel]
        assert "__assertfail" in texts[1][kernel]


@pytest.mark.slow
@pytest.mark.parametrize("target", EACH_TARGET)
@pytest.mark.parametrize("dim", [1, 7, 64, 100, 256, 512, 768, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("storage", list(TYPES))
@pytest.mark.parametrize("num_vectors", [1, 2, 3])
def test_every_variant(launches, num_vectors, storage, dim, target):
    found = launches(target)
    launch_experts(storage, num_vectors, dim)
    if storage in ("fp32", "bf16", "fp16"):
        launch_sums(storage, num_vectors, dim)
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("target", EACH_TARGET)
@pytest.mark.parametrize("k", [1, 8, 16, 19, 32])
@pytest.mark.parametrize("num_sub_keys", [32, 64, 128, 1000, 1024, 2048, 4096])
def test_retrieval_of_every_size(launches, num_sub_keys, k, target):
    found = launches(target)
    launch_retrieval(num_sub_keys, k)
    check(found)
