"""row_adam_: equal to SparseAdam, to AdamW's decay and to the reference; touches its rows alone; passes opcheck."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest
import torch

from tinyexperts.bench.measurement import torch_threads
from tinyexperts.errors import InputError
from tinyexperts.ops.row_adam import cpu, portable, reference, row_adam_
from tinyexperts.ops.row_adam.rounding import round_stochastically

HYPERPARAMETERS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
# Far from every default and large enough that each of them shows in every result.
UNUSUAL = {"learning_rate": 0.3, "beta1": 0.6, "beta2": 0.7, "eps": 0.2, "weight_decay": 0.5, "step": 3}


pytestmark = pytest.mark.usefixtures("kernels")


def random_rows(num_rows: int, num_touched: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(num_rows, generator=generator)[:num_touched].sort().values


def example(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    second_moment: str = "element",
    shape: tuple[int, ...] = (11, 2, 3),
    num_touched: int = 4,
) -> tuple[torch.Tensor, ...]:
    """Tables that already hold moments, so that a forgotten decay shows."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(shape, generator=generator).to(dtype)
    exp_avg = torch.randn(shape, generator=generator)
    exp_avg_sq = torch.rand(shape if second_moment == "element" else shape[:-1], generator=generator)
    if dtype == torch.float64:
        exp_avg, exp_avg_sq = exp_avg.double(), exp_avg_sq.double()
    rows = random_rows(shape[0], num_touched, generator)
    return experts, exp_avg, exp_avg_sq, rows, torch.randn(num_touched, *shape[1:], generator=generator).to(dtype)


def by_reference(*tensors: torch.Tensor, **options: float) -> tuple[torch.Tensor, ...]:
    """The updated tables, in double precision."""
    *tables, grad_rows = (tensor.double().clone() for tensor in (*tensors[:3], tensors[4]))
    reference.row_adam_(*tables, tensors[3], grad_rows, *(options[name] for name in UNUSUAL))
    return tuple(tables)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_row_adam_equals_sparse_adam_over_100_steps(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(50, 2, 8, generator=generator, dtype=dtype)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SparseAdam([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    truth = [tensor.clone() for tensor in (ours, exp_avg, exp_avg_sq)]
    for step in range(1, 101):
        rows = random_rows(50, 7, generator)
        grad_rows = torch.randn(7, 2, 8, generator=generator, dtype=dtype)
        theirs.grad = torch.sparse_coo_tensor(rows[None], grad_rows, start.shape, check_invariants=False)
        with warnings.catch_warnings():
            # SparseAdam itself builds sparse tensors without saying whether torch shall check them.
            warnings.filterwarnings("ignore", message="Sparse invariant checks")
            optimizer.step()
        row_adam_(ours, exp_avg, exp_avg_sq, rows, grad_rows, step=step, **HYPERPARAMETERS)
        reference.row_adam_(*truth, rows, grad_rows, *HYPERPARAMETERS.values(), 0.0, step)
    state = optimizer.state[theirs]
    for tables in ((ours, exp_avg, exp_avg_sq), truth):
        torch.testing.assert_close(tables[0], theirs.detach(), rtol=0, atol=tolerance)
        torch.testing.assert_close(tables[1], state["exp_avg"], rtol=0, atol=tolerance)
        torch.testing.assert_close(tables[2], state["exp_avg_sq"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_row_adam_leaves_untouched_rows_bit_equal(second_moment: str) -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example(second_moment=second_moment)
    before = [table.clone() for table in (experts, exp_avg, exp_avg_sq)]
    row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, step=5, weight_decay=0.1, **HYPERPARAMETERS)
    untouched = torch.ones(11, dtype=torch.bool)
    untouched[rows] = False
    for table, old in zip((experts, exp_avg, exp_avg_sq), before, strict=True):
        assert torch.equal(table[untouched], old[untouched])
        assert (table[rows] != old[rows]).all()


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_adam_on_low_precision_tables_computes_in_fp32_and_rounds_once(
    dtype: torch.dtype, second_moment: str
) -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example(dtype, second_moment=second_moment)
    wide = [tensor.float().clone() for tensor in (experts, exp_avg, exp_avg_sq)]
    if dtype == torch.bfloat16:
        row_adam_(*wide, rows, grad_rows.float(), **UNUSUAL)
    else:  # without a kernel; the reference's order of the sums rounds another way
        portable.row_adam_(*wide, rows, grad_rows.float(), *UNUSUAL.values())
    row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, **UNUSUAL)
    assert torch.equal(experts, wide[0].to(dtype))
    assert torch.equal(exp_avg, wide[1])
    assert torch.equal(exp_avg_sq, wide[2])


def test_row_adam_with_no_rows_changes_nothing() -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example()
    before = [table.clone() for table in (experts, exp_avg, exp_avg_sq)]
    row_adam_(experts, exp_avg, exp_avg_sq, rows[:0], grad_rows[:0], step=1, **HYPERPARAMETERS)
    for table, old in zip((experts, exp_avg, exp_avg_sq), before, strict=True):
        assert torch.equal(table, old)


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("dim", [1, 3, 16, 77])
def test_a_rounding_seed_rounds_the_values_of_the_fp32_step(dim: int, second_moment: str) -> None:
    tables = example(torch.bfloat16, second_moment=second_moment, shape=(11, 2, dim))
    tables = (*tables[:3], tables[3].flip(0), tables[4])
    wide = [tensor.float().clone() for tensor in tables[:3]]
    row_adam_(*wide, tables[3], tables[4].float(), **UNUSUAL)
    elements = torch.arange(11 * 2 * dim).view(11, 2, dim)
    rounded = []
    for seed in (0, 7, 2**32 - 1):
        found = [table.clone() for table in tables[:3]]
        row_adam_(*found, *tables[3:], **UNUSUAL, rounding_seed=seed)
        # Untouched rows are bf16 already, which rounding leaves.
        assert torch.equal(found[0], round_stochastically(wide[0], elements, seed))
        for moment, expected in zip(found[1:], wide[1:], strict=True):
            assert torch.equal(moment, expected)
        by_rows = [table.clone() for table in tables[:3]]
        reference.row_adam_(*by_rows, *tables[3:], *UNUSUAL.values(), seed)
        assert (found[0] != by_rows[0]).float().mean() < 0.05  # where fp32 differs in its last bits
        rounded.append(found[0])
    if dim > 1:
        assert not torch.equal(rounded[0], rounded[1])
        assert not torch.equal(rounded[0], wide[0].bfloat16())


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_row_adam_passes_opcheck(dtype: torch.dtype, second_moment: str) -> None:
    tensors = example(dtype, second_moment=second_moment)
    options = (1e-2, 0.9, 0.99, 1e-8, 0.1, 3)
    for seed in ((), (5,)) if dtype == torch.bfloat16 else ((),):
        torch.library.opcheck(torch.ops.tinyexperts.row_adam_.default, (*tensors, *options, *seed))


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_row_adam_compiled_equals_eager(second_moment: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(
        experts: torch.Tensor, m: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, grad_rows: torch.Tensor
    ) -> torch.Tensor:
        row_adam_(experts, m, v, rows, 2 * grad_rows, step=4, **HYPERPARAMETERS)
        return experts + 1

    eager = example(second_moment=second_moment)
    compiled = [tensor.clone() for tensor in eager]
    row_adam_(*eager[:4], 2 * eager[4], step=4, **HYPERPARAMETERS)
    result = update(*compiled)
    assert torch.equal(result, eager[0] + 1)
    for ours, expected in zip(compiled[:3], eager[:3], strict=True):
        assert torch.equal(ours, expected)


def test_row_adam_takes_a_parameter_and_records_no_graph() -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example()
    parameter = torch.nn.Parameter(experts.clone())
    row_adam_(experts, exp_avg.clone(), exp_avg_sq.clone(), rows, grad_rows, step=1, **HYPERPARAMETERS)
    version = parameter._version
    row_adam_(parameter, exp_avg, exp_avg_sq, rows, grad_rows.requires_grad_(), step=1, **HYPERPARAMETERS)
    assert torch.equal(parameter.detach(), experts)
    assert parameter._version > version, "a graph that saved the parameter sees that it changed"
    assert parameter.is_leaf


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"learning_rate": 0.1},
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"eps": 1e-3},
        {"weight_decay": 0.0},
        {"step": 1},
        {"step": 100_000},
    ],
)
def test_row_adam_equals_the_reference_for_every_option(second_moment: str, change: dict[str, float]) -> None:
    tables = example(torch.float64, second_moment=second_moment, shape=(9, 3, 7), num_touched=5)
    tables = (*tables[:3], tables[3].flip(0), tables[4])  # the rows needn't ascend
    expected = by_reference(*tables, **(UNUSUAL | change))
    unchanged_options = by_reference(*tables, **UNUSUAL)
    assert not change or not torch.allclose(expected[0], unchanged_options[0], rtol=1e-6, atol=0), "the option shows"
    row_adam_(*tables, **(UNUSUAL | change))
    for table, other in zip(tables[:3], expected, strict=True):
        torch.testing.assert_close(table, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("dim", [1, 5, 63, 64, 65, 200])
def test_row_adam_equals_the_reference_over_several_steps_for_any_width(
    dim: int, second_moment: str, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(dim)
    tables = example(dtype, second_moment=second_moment, shape=(12, 2, dim))[:3]
    expected: tuple[torch.Tensor, ...] = tables
    options = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    for step in range(1, 6):
        rows = random_rows(12, 7, generator)
        grad_rows = torch.randn(7, 2, dim, generator=generator).to(dtype)
        expected = by_reference(*expected, rows, grad_rows, step=step, **options)
        row_adam_(*tables, rows, grad_rows, step=step, **options)
    for table, other in zip(tables, expected, strict=True):
        torch.testing.assert_close(table.double(), other, rtol=0, atol=tolerance)


def test_the_second_moment_of_a_vector_is_its_own() -> None:
    # By hand: means of squares 12.5 and 0, so that after one step sqrt(v / (1 - beta2)) is sqrt(12.5) and 0.
    experts, exp_avg, exp_avg_sq = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.zeros(3, 2)
    grad_rows = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    row_adam_(experts, exp_avg, exp_avg_sq, torch.tensor([1]), grad_rows, step=1, **HYPERPARAMETERS)
    torch.testing.assert_close(exp_avg_sq, torch.tensor([[0.0, 0.0], [0.125, 0.0], [0.0, 0.0]]))
    step = -1e-2 * torch.tensor([3.0, 4.0]) / math.sqrt(12.5)
    torch.testing.assert_close(experts[1], torch.stack([step, torch.zeros(2)]))
    assert not experts[[0, 2]].any()


@pytest.mark.parametrize(
    ("shape", "second_moment"),
    [((9,), "element"), *(((9, *rest), kind) for rest in ((6,), (2, 3, 5)) for kind in ("element", "row"))],
)
def test_row_adam_takes_tables_of_any_number_of_dimensions(shape: tuple[int, ...], second_moment: str) -> None:
    tables = example(torch.float64, second_moment=second_moment, shape=shape)
    expected = by_reference(*tables, **UNUSUAL)
    row_adam_(*tables, **UNUSUAL)
    for table, other in zip(tables[:3], expected, strict=True):
        torch.testing.assert_close(table, other, rtol=1e-13, atol=1e-13)


def test_weight_decay_equals_adamw_where_every_row_is_touched() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(10, 2, 5, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(start.clone())
    # eps = 0: AdamW adds it after the bias correction, SparseAdam before.
    optimizer = torch.optim.AdamW([theirs], lr=0.05, betas=(0.8, 0.95), eps=0.0, weight_decay=0.3)
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    options = {"learning_rate": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 0.0, "weight_decay": 0.3}
    for step in range(1, 31):
        theirs.grad = torch.randn(10, 2, 5, generator=generator, dtype=torch.float64)
        optimizer.step()
        row_adam_(ours, exp_avg, exp_avg_sq, torch.arange(10), theirs.grad, step=step, **options)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("seed", [None, 3])
def test_bit_equal_for_any_number_of_threads(
    seed: int | None, second_moment: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[tuple[int, int]] = []
    name = "_step_of_elements" if second_moment == "element" else "_step_of_vectors"
    kernel = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, lambda *arguments: parts.append(arguments[-2:]) or kernel(*arguments))
    results = []
    for threads in (1, 2):
        dtype = torch.float32 if seed is None else torch.bfloat16
        tables = example(dtype, second_moment=second_moment, shape=(3000, 2, 77), num_touched=2000)
        with torch_threads(threads):
            row_adam_(*tables, **UNUSUAL, rounding_seed=seed)
        results.append(tables[:3])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    if kernels == "cpu":
        assert parts[0] == (0, 2000)
        assert len(parts) > 3
        assert sorted(parts[1:])[0][0] == 0
        assert sorted(parts[1:])[-1][1] == 2000


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("strided", range(5))
def test_row_adam_updates_and_reads_tensors_that_are_not_contiguous(second_moment: str, strided: int) -> None:
    expected = example(second_moment=second_moment)
    tensors = [tensor.clone() for tensor in expected]
    room = torch.zeros(*tensors[strided].shape, 2, dtype=tensors[strided].dtype)
    room[..., 0] = tensors[strided]
    tensors[strided] = room[..., 0]
    assert not tensors[strided].is_contiguous()
    row_adam_(*expected, **UNUSUAL)
    row_adam_(*tensors, **UNUSUAL)
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-6)
    assert not room[..., 1].any()


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize(
    ("table_dtype", "moment_dtype"),
    [(torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_moments_of_other_types_are_computed_in_the_type_of_the_table(
    table_dtype: torch.dtype, moment_dtype: torch.dtype, second_moment: str
) -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example(table_dtype, second_moment=second_moment)
    tables = (experts, exp_avg.to(moment_dtype), exp_avg_sq.to(moment_dtype))
    wide = [table.float().clone() for table in tables]
    portable.row_adam_(*wide, rows, grad_rows.float(), *UNUSUAL.values())
    row_adam_(*tables, rows, grad_rows, **UNUSUAL)
    for table, other in zip(tables, wide, strict=True):
        assert torch.equal(table, other.to(table.dtype))


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_may_be_of_another_type_than_the_table(dtype: torch.dtype, second_moment: str) -> None:
    *tables, rows, grad_rows = example(second_moment=second_moment)
    expected = [table.clone() for table in tables]
    grad_rows = grad_rows.to(dtype)
    row_adam_(*expected, rows, grad_rows.float(), **UNUSUAL)
    row_adam_(*tables, rows, grad_rows, **UNUSUAL)
    for table, other in zip(tables, expected, strict=True):
        assert torch.equal(table, other)


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_values_that_are_not_finite_and_zeros_come_out_as_in_the_reference(second_moment: str) -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example(second_moment=second_moment, num_touched=6)
    exp_avg.zero_()
    exp_avg_sq.zero_()
    grad_rows[0, 0, 1], grad_rows[1, 1, 0] = math.nan, math.inf
    grad_rows[2], grad_rows[3], grad_rows[4] = 0.0, 1e-30, 1e30  # 0 / 0 for eps = 0, squares that vanish, and overflow
    expected = [table.clone() for table in (experts, exp_avg, exp_avg_sq)]
    options = {**UNUSUAL, "eps": 0.0}
    reference.row_adam_(*expected, rows, grad_rows, *options.values())
    row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, **options)
    assert expected[0].isnan().any()
    for table, other in zip((experts, exp_avg, exp_avg_sq), expected, strict=True):
        torch.testing.assert_close(table, other, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(11, 0, 3), (11, 2, 0)])
@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_rows_without_elements_have_nothing_to_update(shape: tuple[int, ...], second_moment: str) -> None:
    tables = example(second_moment=second_moment, shape=shape)
    before = tables[2].clone()
    row_adam_(*tables, **UNUSUAL)
    assert torch.equal(tables[2], before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is taken only where it is touched")
def test_tables_of_more_than_2_to_31_elements() -> None:
    num_rows, dim = 2**17 + 8, 2**14
    experts, exp_avg = (torch.from_numpy(np.zeros((num_rows, 1, dim), dtype=np.float32)) for _ in range(2))
    exp_avg_sq = torch.zeros(num_rows, 1)
    rows = torch.tensor([1, num_rows - 1])
    grad_rows = torch.tensor([2.0, -3.0])[:, None, None].expand(2, 1, dim)
    row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, step=1, **HYPERPARAMETERS)
    # The first step of Adam is one learning rate long.
    torch.testing.assert_close(experts[rows, 0, ::4095], torch.tensor([[-0.01], [0.01]]).expand(2, 5))
    torch.testing.assert_close(exp_avg[rows, 0, -1], torch.tensor([0.2, -0.3]))
    assert not experts[[0, 2, 7, num_rows - 2]].any()
    assert exp_avg_sq.count_nonzero() == 2


def test_row_adam_says_what_is_wrong_with_its_input(kernels: str) -> None:
    experts, exp_avg, exp_avg_sq, rows, grad_rows = example()
    with pytest.raises(InputError, match=r"rows must be int64 of shape \[R\], got torch.int32"):
        row_adam_(experts, exp_avg, exp_avg_sq, rows.int(), grad_rows, step=1, **HYPERPARAMETERS)
    with pytest.raises(InputError, match=r"shape \[4, 2, 3\], got \[3, 2, 3\]"):
        row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows[:3], step=1, **HYPERPARAMETERS)
    with pytest.raises(InputError, match=r"the table's shape \[11, 2, 3\]"):
        row_adam_(experts, exp_avg[:4], exp_avg_sq, rows, grad_rows, step=1, **HYPERPARAMETERS)
    with pytest.raises(InputError, match=r"one device, got experts on cpu, .* rows on cpu, grad_rows on meta"):
        row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows.to("meta"), step=1, **HYPERPARAMETERS)
    with pytest.raises(InputError, match="counted from 1, got 0"):
        row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, step=0, **HYPERPARAMETERS)
    with pytest.raises(InputError, match=r"rounding_seed is for bf16 tables, got one of torch.float32"):
        row_adam_(experts, exp_avg, exp_avg_sq, rows, grad_rows, step=1, rounding_seed=0, **HYPERPARAMETERS)
    for seed in (-1, 2**32):
        tables = experts.bfloat16(), exp_avg, exp_avg_sq
        with pytest.raises(InputError, match=f"at least 0 and less than 2\\^32, got {seed}"):
            row_adam_(*tables, rows, grad_rows, step=1, rounding_seed=seed, **HYPERPARAMETERS)
    if kernels == "triton":  # rows are not read before a kernel runs, but in it (TRITON_DEBUG=1)
        return
    for wrong, number in ((rows.clone(), 11), (rows.clone(), -1)):
        wrong[2] = number
        with pytest.raises(InputError, match=f"rows must be between 0 and N - 1 = 10, got {number}"):
            row_adam_(experts, exp_avg, exp_avg_sq, wrong, grad_rows, step=1, **HYPERPARAMETERS)
    for second in (exp_avg_sq[:4], exp_avg_sq[:, :, 0].T, exp_avg_sq[..., :1], exp_avg_sq[:, 0, 0]):
        with pytest.raises(InputError, match=r"shape \[11, 2, 3\], or \[11, 2\] for one number a vector, got \["):
            row_adam_(experts, exp_avg, second, rows, grad_rows, step=1, **HYPERPARAMETERS)
    flat = [tensor[..., 0, 0] for tensor in (experts, exp_avg)]
    with pytest.raises(InputError, match=r"exp_avg_sq must have the table's shape \[11\], got \[\]"):
        row_adam_(*flat, exp_avg_sq[0, 0, 0], rows, grad_rows[:, 0, 0], step=1, **HYPERPARAMETERS)
    with pytest.raises(InputError, match="at least one dimension, got a scalar"):
        row_adam_(*(experts[0, 0, 0],) * 3, rows, grad_rows[:, 0, 0], step=1, **HYPERPARAMETERS)
    for table, old in zip((experts, exp_avg, exp_avg_sq), example()[:3], strict=True):
        assert torch.equal(table, old)
