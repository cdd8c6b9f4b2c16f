"""One run of a study: trained or resumed, and evaluated on the held-out split and on every evaluation corpus."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from tinyexperts import data, evaluation, training
from tinyexperts.files import write_atomically
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.training.checkpoint import checkpoints, keep_weights


def finish_run(folder: str | os.PathLike[str], name: str) -> None:
    """Finish a planned run, and then delete its checkpoints (a study has hundreds) unless the study keeps them.

    Args:
        folder (str | PathLike): the folder of the study.
        name (str): the name of the run.

    Raises:
        InputError: as training does; no such run.
    """
    study = StudyFolder(folder)
    run = study.planned_run(name)
    with study.run_lock(name):
        try:
            _finish(study, run.config)
        except training.Diverged as error:
            study.note_failure(name, str(error), diverged=True)
            shutil.rmtree(run.config.run / "checkpoints", ignore_errors=True)
            raise
        study.forget_failure(name)
        if run.keeps_checkpoint:
            keep_weights(run.config.run)
        elif not study.settings().keeps_checkpoints:
            shutil.rmtree(run.config.run / "checkpoints", ignore_errors=True)


def _finish(study: StudyFolder, config: training.TrainConfig) -> None:
    settings = study.settings()
    missing = {
        corpus: path
        for corpus, path in settings.corpora().items()
        if not (config.run / f"evaluation-{corpus}.json").exists()
    }
    held_out = not (config.run / "evaluation.json").exists()
    if not missing and not held_out:
        return
    if not checkpoints(config.run):
        # The weights are made again, maybe after a result was deleted: all results are to be of the new ones.
        missing, held_out = settings.corpora(), True
    training.train(
        config,
        resume=(config.run / "config.json").exists(),
        progress=False,
        command=("study", "run", str(study.path), config.run.name),
    )
    model = training.load_model(config.run, device=training.choose_device(config.device))
    options: dict[str, Any] = {"batch_size": config.batch_size, "max_tokens": settings.evaluation_tokens}
    for corpus, path in missing.items():
        text = data.EncodedText([path], data.Tokenizer.load(config.run / "tokenizer.json"))
        summary = evaluation.evaluate(model, text, **options).summary()
        write_atomically(config.run / f"evaluation-{corpus}.json", json.dumps(summary, indent=2))
    if held_out:
        dataset = data.TokenDataset.open(config.data)
        statements = [split for split in dataset.held_out_splits if split.facts is not None]
        evaluation.evaluate(model, dataset.split("validation"), statements=statements, **options).save(config.run)
