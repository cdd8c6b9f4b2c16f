"""A study's folder with made-up results, for tests of what is made of it."""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyexperts.planning.model_costs import account
from tinyexperts.study.runner.planned_run import finish_run
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.runner.study_record import StudySettings
from tinyexperts.study.scales import on_facts, scale_named


def fill(path, study, loss, *, corpora=(), skip=(), facts=None, num_entities=None):
    """A study folder at laptop scale whose runs ended with the given losses, and recalls and nats by split."""
    scale = scale_named("laptop", data=Path("data/none"), vocab_size=512)
    scale = scale if facts is None else replace(on_facts(scale, 1000), num_entities=num_entities or {})
    folder, stages = StudyFolder(path), study.stages(scale)
    folder.begin(StudySettings(study=study.name, scale="laptop", data="data/none", evaluation_corpora=corpora))
    known = {}
    for stage in stages:
        runs = stage(known)
        folder.write_planned(runs)
        for run in runs:
            if run.name in skip:
                continue
            known[run.name] = value = loss(run)
            where, cost = folder.run_path(run.name), account(run.config)
            where.mkdir(parents=True)
            spent = {"step": cost.num_steps, "num_tokens": cost.num_tokens}
            end = cost.training_flops / 1e11 * (1.0 if run.method == "dense" else 1.25) / (2 if run.is_alone else 1)
            lines = [
                {
                    "split": "validation",
                    **spent,
                    "seconds": seconds,
                    "loss": value + (end - seconds) / end,
                    "training_flops": cost.training_flops * seconds / end,
                }
                for seconds in (end / 2, end)
            ]
            (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (where / "config.json").write_text("{}")
            versions = {
                "tinyexperts": "0.1",
                "torch": "2.13",
                "python": "3.11",
                "platform": f"machine {run.config.seed}",
            }
            (where / "run.json").write_text(json.dumps({"num_steps": cost.num_steps, "versions": versions}))
            usage = []
            if run.method == "peer":
                np.save(where / "usage.npy", np.full(4, 0.25))
                usage = [
                    {"layer": 2, "num_experts": 4, "usage": 0.75, "unevenness": 0.5, "gini": 0.1, "num_dead": 1,
                     "file": "usage.npy"}
                ]  # fmt: skip
            split = {"new": value + 0.5, "stood_earlier": value - 0.5}
            evaluation = {"loss": value, "loss_by_copy": split, "expert_usage": usage}
            if facts is not None:
                evaluation["facts"] = {
                    split: {"all": {"recall": recall, "nats": nats}, "bits_per_parameter": nats / 100}
                    for split, (recall, nats) in facts(run).items()
                }
            (where / "evaluation.json").write_text(json.dumps(evaluation))
            for corpus in corpora:
                (where / f"evaluation-{Path(corpus).stem}.json").write_text(json.dumps({"loss": value + 0.25}))
    return folder


def finish_and_keep_stderr(folder, name, path):
    """In a process of its own, where stderr is the test's."""
    with path.open("w") as file, redirect_stderr(file):
        finish_run(folder, name)
