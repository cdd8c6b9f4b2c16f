"""The report in a real browser: nothing fails, nothing is fetched, every figure is drawn, no page scrolls sideways."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, look_at

from tinyexperts.comparison.report import write_report

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = [run_folder(root, method, seed) for method in ("dense", "peer") for seed in (0, 1)]
    write_report(runs, root / "report.html", command="make demo", title="Twins")
    return root / "report.html"


def run_folder(root: Path, method: str, seed: int) -> Path:
    folder = root / f"{method}-seed{seed}"
    folder.mkdir()
    end = 4.2 - 0.03 * (method == "peer") + 0.01 * seed
    lines = []
    for i in range(21):
        spent = {"num_tokens": 50_000 * i, "training_flops": 1.6e11 * i, "seconds": 4.0 * i}
        loss = end + 4 * math.exp(-i / 2)
        lines.append({"split": "validation", "step": i, "loss": loss, **spent})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    usage = []
    if method == "peer":
        generator = np.random.default_rng(seed)
        weight = generator.lognormal(0, 2, 4096) * (generator.random(4096) < 0.6)
        np.save(folder / "usage.npy", weight / weight.sum())
        entry = {"layer": 2, "num_experts": 4096, "usage": 0.6, "unevenness": 2.0, "gini": 0.9, "num_dead": 1638}
        usage = [{**entry, "file": "usage.npy"}]
    evaluation = {"loss": end, "perplexity": math.exp(end), "expert_usage": usage}
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    long_word = "x" * 300
    sample = {
        "prompt": "<script>window.harmed = true</script>",
        "completion": f"<img src=x onerror='harm()'> {long_word}",
    }
    (folder / "samples.json").write_text(json.dumps([sample]), encoding="utf-8")
    command = f"tinyexperts train {method} --run {long_word}"
    (folder / "run.json").write_text(json.dumps({"command": command}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"seed": seed}), encoding="utf-8")
    return folder


def test_report_opens_without_errors_or_requests_and_draws_every_figure(page_file: Path) -> None:
    looks = look_at(page_file, sync_api)
    assert looks.messages == []
    assert looks.fetched == []
    assert not looks.is_harmed
    assert max(looks.overflow.values()) <= 0
    for width, smallest in ((1280, 400), (400, 300)):
        assert len(looks.figures[width]) == 6
        for figure in looks.figures[width]:
            assert figure["width"] >= smallest
            assert figure["height"] >= smallest / 2
            assert figure["drawn"] >= 10
            assert figure["outside"] == []
