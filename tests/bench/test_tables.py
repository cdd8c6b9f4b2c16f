"""The benchmark of tables of fewer bits: what it reports, and that a wrong kernel is refused."""

from __future__ import annotations

import json

import pytest
import torch

from tinyexperts.bench.check import check_quantized_experts
from tinyexperts.bench.tables import KINDS, stored_tables
from tinyexperts.errors import InputError
from tinyexperts.ops.expert_mlp import cpu as expert_cpu
from tinyexperts.ops.expert_mlp import operator as expert_operator

TINY = ["bench", "tables", "--d-model", 48, 64, "--num-experts", 50, "--retrieved", 6, "--threads", 1, "--repeats", 1]


def test_a_tiny_run_reports_everything(run_cli, tmp_path):
    code, out, err = run_cli(*TINY, "--num-tokens", 1, 3)
    assert code == 0, err
    report = json.loads((tmp_path / "runs/bench/tables.json").read_text())
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["configuration"]["d_model"] == [48, 64]
    settings = [(each["d_model"], each["num_tokens"], each["threads"]) for each in report["results"]]
    assert settings == [(48, 1, 1), (48, 3, 1), (64, 1, 1), (64, 3, 1)]
    for result in report["results"]:
        d = result["d_model"]
        elements = 6 * 2 * d
        expected = [4 * elements, 2 * elements, elements + 6 * 2 * 4, elements // 2 + 6 * 2 * 2 * 2]
        assert list(result["bytes_per_token"].items()) == list(zip(KINDS, expected, strict=True))
        for kind in KINDS:
            seconds = [result["forward_seconds"][each]["median"] for each in ("fp32", kind)]
            assert result["ratio"][kind]["median"] == pytest.approx(seconds[0] / seconds[1])
    for kind in KINDS:
        assert out.count(kind) >= 4


def test_tables_of_fewer_bits_are_those_of_the_first():
    numbers = torch.randn(9, 2, 48, generator=torch.Generator().manual_seed(0))
    tables = stored_tables(numbers)
    assert list(tables) == list(KINDS)
    assert [str(stored.table.dtype) for stored in tables.values()] == [
        "torch.float32",
        "torch.bfloat16",
        "torch.int8",
        "torch.uint8",
    ]
    assert [stored.row_bytes for stored in tables.values()] == [384, 192, 104, 48 + 8]
    torch.testing.assert_close(tables["bf16"].table.float(), numbers, rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    ("function", "spoil", "name"),
    [
        ("_expert_mlp", lambda y, pre: (y * 1.001, pre), "output of 50 experts in 4 bits"),
        ("_expert_mlp_backward", lambda x, w, f: (x * 1.001, w, f), "gradient of x of 50 experts in 4 bits"),
        ("_expert_mlp_backward", lambda x, w, f: (x, w + 0.1, f), "gradient of the router weights of 50 experts in 4"),
    ],
)
def test_a_fault_in_the_kernel_of_4_bits_is_refused(run_cli, monkeypatch, tmp_path, function, spoil, name):
    kernels = getattr(expert_operator, function)._backend_fns
    right = kernels["cpu"]

    def wrong(*arguments):
        found = right(*arguments)
        return spoil(*found) if any(getattr(each, "dtype", None) == torch.uint8 for each in arguments) else found

    monkeypatch.setitem(kernels, "cpu", wrong)
    code, out, err = run_cli(*TINY)
    assert (code, out) == (2, "")
    assert err.startswith(f"tinyexperts: nothing is reported: the kernels' {name}")
    assert not (tmp_path / "runs/bench/tables.json").exists()


@pytest.mark.parametrize("kind", ["int8", "4 bits"])
def test_a_wrong_scale_is_found(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(5, 48, generator=generator), torch.rand(5, 7, generator=generator)
    ids = torch.randint(50, (5, 7), generator=generator)
    stored = stored_tables(torch.randn(50, 2, 48, generator=generator))[kind]
    check_quantized_experts(x, stored.table, stored.scales, ids, weights, "gelu", generator)
    array_of_scales = expert_cpu._array_of_scales
    monkeypatch.setattr(expert_cpu, "_array_of_scales", lambda scales, dtype: array_of_scales(scales * 1.01, dtype))
    with pytest.raises(InputError, match=rf"output of 50 experts in {kind} differs"):
        check_quantized_experts(x, stored.table, stored.scales, ids, weights, "gelu", generator)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--d-model", 0], "--d-model must be one or more numbers of at least 1, got (0,)"),
        (["--num-tokens", 0], "--num-tokens must be one or more numbers of at least 1, got (0,)"),
        (["--threads", -1], "--threads must be one or more numbers of at least 1, got (-1,)"),
        (["--num-experts", 0], "--num-experts must be at least 1, got 0"),
        (["--retrieved", 0], "--retrieved must be at least 1, got 0"),
        (["--repeats", 0], "--repeats must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(run_cli, arguments, sentence):
    code, out, err = run_cli(*TINY, *arguments)
    assert (code, out, err) == (2, "", f"tinyexperts: {sentence}\n")
