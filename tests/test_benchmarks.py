"""The benchmark of ranks checks what it counts against the plan; here its last counts, and wrong ones."""

from __future__ import annotations

import argparse
import json
import math
import runpy
from pathlib import Path

import pytest

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
