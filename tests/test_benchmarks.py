"""The scripts of benchmarks/: the last counts of ranks against the plan, and wrong ones; all goals of the layer."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

from tinyexperts.bench import timing
from tinyexperts.bench.timing import Spread

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scale_out():
    return runpy.run_path(str(BENCHMARKS / "scale_out.py"))


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (2, 2)])
def test_the_bytes_that_were_counted_are_those_of_the_plan(scale_out, mesh):
    measured = json.loads((BENCHMARKS / "results/scale_out.json").read_text())
    arguments = argparse.Namespace(**measured["configuration"], data=Path("none"))
    label = " x ".join(map(str, mesh))
    counted = measured["sent_bytes_of_rank_0"][label]
    sent = [counted] * math.prod(mesh)
    assert scale_out["check"](arguments, mesh, sent) == measured["planned_bytes"][label]
    wrong = counted | {"alltoall_base_": counted["alltoall_base_"] + 4}
    with pytest.raises(SystemExit, match="rank 1 sent"):
        scale_out["check"](arguments, mesh, [counted, wrong, *sent[2:]])


def test_the_goals_of_the_readme_are_measured(monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0)
    spec = importlib.util.spec_from_file_location("cpu_layer", BENCHMARKS / "cpu_layer.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cpu_layer", script)
    spec.loader.exec_module(script)
    sizes = script.Sizes(
        d_model=16, num_experts=64, wide_d_model=32, wide_num_experts=64, few_experts=16, many_experts=256, num_tokens=8
    )
    shown = []
    measured, results = script.measure_goals(sizes, repeats=1, show_progress=shown.append)
    by_peer_pytorch = {"forward", "one_token", "step", "wide_step", "activations"}
    assert set(measured) == set(script.GOALS) - (set() if importlib.util.find_spec("PEER_pytorch") else by_peer_pytorch)
    assert [result.num_tokens for result in results] == [8, 1, 8]
    assert results[2].d_model == 32
    assert len(shown) > 8
    spreads = {name: Spread.of([value]) for name, value in {"share": 0.9, "many_experts": 2.0}.items()}
    lines = script.report_of(spreads)
    assert [line["reached"] for line in lines[:2]] == ["must", "not measured"]
    assert lines[5]["reached"] == "aim"
    assert script.table_of(measured).row_count == len(script.GOALS)


def test_peer_pytorch_is_a_dependency_of_the_tests_alone():
    project = tomllib.loads((BENCHMARKS.parent / "pyproject.toml").read_text())["project"]
    extras = {None: project["dependencies"], **project["optional-dependencies"]}
    assert [extra for extra, listed in extras.items() if "peer-pytorch" in " ".join(listed).lower()] == ["dev"]


def test_steps_with_tables_in_bf16_are_compared_with_those_in_fp32(monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0)
    script = runpy.run_path(str(BENCHMARKS / "bf16_training.py"))
    results = script["measure"](16, 64, num_tokens=8, repeats=1)
    assert [(each["second_moment"], each["table"]) for each in results] == [
        (moment, table) for moment in ("element", "row") for table in ("fp32", "bf16", "bf16 to nearest")
    ]
    assert all(each["fp32_over_it"]["step"]["median"] > 0 for each in results)
    assert script["table_of"](results).row_count == 6
