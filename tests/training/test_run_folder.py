"""A run folder as it is read while it grows."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from tinyexperts.training import run_folder
from tinyexperts.training.last_metrics import last_metrics


def test_last_metrics_reads_the_last_whole_lines_of_a_growing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path) == {}
    lines = [{"split": "validation", "step": 0}, *({"split": "train", "step": step} for step in range(5000))]
    lines.append({"split": "validation", "step": 4999})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"split": "train", "st', encoding="utf-8")
    assert path.stat().st_size > 2 * 65536
    assert {split: line["step"] for split, line in last_metrics(path).items()} == {"train": 4999, "validation": 4999}


def test_a_board_that_has_no_room_hides_no_other_error(tmp_path, monkeypatch):
    """TensorBoard's writer is a thread of its own, whose error comes up where it is closed."""
    metrics = run_folder.Metrics(tmp_path, after_step=0)
    metrics.write("train", 1, loss=1.0)
    close = metrics._board.close

    def fail():
        close()
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(metrics._board, "close", fail)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"split": "train", "step": 1, "loss": 1.0}
