"""The newest measurements of a run, which may be going on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_TAIL_BYTES = 65536  # of metrics.jsonl, ample for its last lines


def last_metrics(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last whole line of each split in a metrics.jsonl that may be growing; {} without one yet."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return {}
    last: dict[str, dict[str, Any]] = {}
    for raw in tail.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:  # the first line may be cut by the tail, the last one half written
            continue
        if isinstance(line, dict) and "split" in line:
            last[line["split"]] = line
    return last
