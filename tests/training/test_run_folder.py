"""A run folder as it is read while it grows."""

from __future__ import annotations

import json
from pathlib import Path

from tinyexperts.training.run_folder import last_metrics


def test_last_metrics_reads_the_last_whole_lines_of_a_growing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path) == {}
    lines = [{"split": "validation", "step": 0}, *({"split": "train", "step": step} for step in range(5000))]
    lines.append({"split": "validation", "step": 4999})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"split": "train", "st', encoding="utf-8")
    assert path.stat().st_size > 2 * 65536
    assert {split: line["step"] for split, line in last_metrics(path).items()} == {"train": 4999, "validation": 4999}
