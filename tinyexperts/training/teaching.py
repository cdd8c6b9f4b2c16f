"""Teach a trained model new facts or texts, and measure what it has learned and what it still knows."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tinyexperts.data import TokenDataset, TokenSplit
from tinyexperts.errors import InputError
from tinyexperts.evaluation import measure_facts, measure_perplexity
from tinyexperts.evaluation.facts import AnsweredQuestion, answer_some
from tinyexperts.files import exclusive_lock, sha256_of_file, write_atomically
from tinyexperts.model import Transformer
from tinyexperts.optim import split_parameters
from tinyexperts.training.checkpoint import load_model
from tinyexperts.training.config import (
    CheckpointConfig,
    MemoryConfig,
    OptimizerConfig,
    ScheduleConfig,
    TeachingConfig,
    TrainConfig,
    path_of,
    refuse_quantized_tables,
)
from tinyexperts.training.device import choose_device
from tinyexperts.training.loop import train
from tinyexperts.training.new_facts import contradicted_data, prepared_data, remarks
from tinyexperts.training.own_samples import open_texts
from tinyexperts.training.run_folder import is_run, read_config
from tinyexperts.training.teach_config import TeachConfig
from tinyexperts.training.teaching_history import PastRun, history, kept_memories
from tinyexperts.training.teaching_start import tables_to_teach
from tinyexperts.training.trained_run import set_threads


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """The knowledge of a model about some texts."""

    loss: float
    """Held-out loss in nats a token."""
    recall: float | None = None
    """Share of the questions that it answers, of facts."""
    nats_per_fact: float | None = None
    """Loss of an answer, of facts."""
    answers: tuple[AnsweredQuestion, ...] = ()
    """Some questions with the truth and the model's answers, of facts."""


SAMPLE_TOKENS = 131072
_KNOWLEDGE = TypeAdapter(dict[str, Knowledge])


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The result of teaching, by what is asked: `new`, `old`, earlier teachings by their runs' names, `own-samples`.

    `contradicted` are the old values of facts that were taught another one; to know them no more is right.
    """

    before: dict[str, Knowledge]
    after: dict[str, Knowledge]
    num_passes: int
    """Times that what is new was gone over."""
    seconds: float
    """Seconds of training steps."""
    remarks: tuple[str, ...]
    """Sentences about the new facts: which repeat or contradict old ones, which words are split into letters."""


def teach_run(
    run: str | Path, config: TeachConfig, *, progress: bool = True, command: Sequence[str] | None = None
) -> Taught:
    """Teach a run's model something new; the run stays as it is, and a new one holds the model that was taught.

    Args:
        run (str | Path): folder of the run.
        config (TeachConfig): what is taught, and how.
        progress (bool): show progress bars.
        command (Sequence[str] | None): the arguments of `tinyexperts`, for run.json; None from Python.

    Raises:
        InputError: no such run, nothing new, another run in the output's folder, a model without a table of which the
            tables are to be trained, or with a quantized one, data that are gone, own samples that are of no use.
        Interrupted: after Ctrl-C and the like, when the run is saved; the same call continues.
    """
    base = path_of("run", run)
    past = history(base)
    set_threads(config.threads)
    if config.output.resolve() == base.resolve():
        raise InputError(f"the run that is taught stays as it is: output must be another folder than {base}")
    model = load_model(base, device=choose_device(config.device))
    refuse_quantized_tables(model.config)
    if config.train == "tables":
        tables_to_teach(model)
    if config.table_learning_rate is not None and not split_parameters(model).tables:
        raise InputError(f"table_learning_rate is for models with a table, got {config.table_learning_rate}")
    memories, told = _memories(config, past)
    old_data = {each.name: dataset for each in reversed(past) if (dataset := each.data()) is not None}
    old_texts = [memory.data for memory in memories] or [dataset.folder for dataset in old_data.values()]
    if config.rows is not None and not old_texts:
        raise InputError(f"rows need old texts to count, and there are none, got {config.rows}")
    with _folder_of(config):
        _check_options(config, base)
        new_data = prepared_data(config, base, list(old_data.values()))
        asked = {"new": new_data} | old_data
        if config.remember == "own-samples":
            texts = open_texts(memories[-1], model, seed=config.seed, progress=progress)
            if not old_data:
                asked["own-samples"] = texts
        if (overruled := contradicted_data(config, base, new_data, list(old_data.values()))) is not None:
            asked["contradicted"] = overruled
        told = (*told, *remarks(new_data, old_data.values()))
        for sentence in told:
            print(sentence, file=sys.stderr)
        training = _training_config(config, base, new_data, memories, asked, old_texts)
        before = _remembered(config.folder / "before.json", lambda: _ask(model, asked))
    train(training, resume=is_run(config.output), progress=progress, command=command)
    after = _ask(load_model(config.output, device=choose_device(config.device)), asked)
    steps, seconds = _spent(config.output)
    taught = Taught(
        before=before, after=after, num_passes=steps // training.validation_every, seconds=seconds, remarks=told
    )
    write_atomically(config.output / "taught.json", json.dumps(asdict(taught), indent=2))
    return taught


@contextmanager
def _folder_of(config: TeachConfig) -> Iterator[None]:
    """Hold the part of the run's folder that is made before its first step; it goes again if nothing comes into it."""
    is_new = not config.output.exists()
    config.folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(config.folder / "lock", f"another process teaches in {config.output}"):
            yield
    except BaseException:
        if is_new and {path.name for path in config.folder.iterdir()} <= {"lock", "options.json"}:
            shutil.rmtree(config.output)
        raise


def _check_options(config: TeachConfig, base: Path) -> None:
    """Note the options of the folder's first call, or check that they are the same: what was made of them is kept.

    Raises:
        InputError: they are others.
    """
    path = config.folder / "options.json"
    options = {name: str(value) for name, value in ({"run": base} | vars(config)).items() if name != "output"}
    for name in ("facts", "phrasings"):
        if (file := getattr(config, name)) is not None and file.is_file():
            options[name] += f" (sha256 {sha256_of_file(file)[:12]})"
    if not path.exists():
        write_atomically(path, json.dumps(options, indent=2))
        return
    before: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    changes = [f"{name} was {before.get(name)}, is {now}" for name, now in options.items() if before.get(name) != now]
    if changes:
        raise InputError(f"{config.output} was begun with other options: {'; '.join(changes)}")


def _memories(config: TeachConfig, past: list[PastRun]) -> tuple[tuple[MemoryConfig, ...], tuple[str, ...]]:
    """Return what is remembered by, and sentences about what can be remembered no more.

    Raises:
        InputError: data that are to be gone over again are gone.
    """
    kept, told = kept_memories(past)
    if config.remember == "nothing":
        return (), told
    if config.remember == "data":
        gone = [each for each in past if each.data() is None]
        if gone:
            raise InputError(
                f"{gone[0].config.data}, the data of {gone[0].run}, is gone or was made by another tokenizer: "
                "remember own-samples or nothing"
            )
        return tuple(MemoryConfig(data=each.config.data) for each in past), told
    tokens = config.sample_tokens or (SAMPLE_TOKENS // 4 if kept else SAMPLE_TOKENS)
    own = MemoryConfig(data=config.folder / "own-samples", teacher=past[0].run, sample_tokens=tokens)
    return (*kept, own), told


def _training_config(
    config: TeachConfig,
    base: Path,
    new_data: TokenDataset,
    memories: tuple[MemoryConfig, ...],
    asked: Mapping[str, TokenDataset],
    old_texts: Sequence[Path],
) -> TrainConfig:
    return teaching_run(
        read_config(base),
        TeachingConfig(
            base=base,
            train=config.train,
            rank=config.rank,
            rows=config.rows,
            old_texts=() if config.rows is None else tuple(old_texts),
            remember=memories,
            remember_weight=1.0 if config.remember_weight is None else config.remember_weight,
            asked={name: dataset.folder for name, dataset in asked.items() if name != "new"},
        ),
        new_data,
        run=config.output,
        passes=config.passes,
        table_learning_rate=config.table_learning_rate,
        learning_rate=config.learning_rate,
        device=config.device,
        threads=config.threads,
        seed=config.seed,
    )


def teaching_run(
    base: TrainConfig,
    teaching: TeachingConfig,
    new_data: TokenDataset,
    *,
    run: Path,
    passes: int = 16,
    table_learning_rate: float | None = None,
    learning_rate: float | None = None,
    **settings: Any,
) -> TrainConfig:
    """Return the configuration of a run that teaches: a constant learning rate, a validation after each pass.

    Args:
        base (TrainConfig): the configuration of the run that it begins with.
        teaching (TeachingConfig): what is trained, and what is remembered.
        new_data (TokenDataset): the data set of what is new.
        run (Path): the folder of the new run.
        passes (int): times to go over what is new, at most.
        table_learning_rate (float | None): the learning rate of the tables; without it that of TeachConfig.
        learning_rate (float | None): that of all other weights; without it that of TeachConfig.
        **settings: other settings of the new run.
    """
    if table_learning_rate is None:
        table_learning_rate = 1e-2 if teaching.train == "tables" else 3e-3
    if learning_rate is None:
        learning_rate = 1e-2 if teaching.train == "low-rank" else 1e-3
    num_windows = max(1, (new_data.split("train").num_tokens - 1) // base.model.context_length)
    steps = -(-num_windows // base.batch_size)  # of a pass
    return replace(
        base,
        run=run,
        data=new_data.folder,
        num_steps=passes * steps,
        training_flops=None,
        gradient_accumulation=1,
        optimizer=OptimizerConfig(
            matrix_learning_rate=learning_rate,
            embedding_learning_rate=learning_rate,
            head_learning_rate=learning_rate,
            table_learning_rate=table_learning_rate,
            table_second_moment=base.optimizer.table_second_moment,
            table_dtype=base.optimizer.table_dtype,
            table_gradients="auto" if teaching.rows is None else "sparse",
        ),
        schedule=ScheduleConfig(warmup_fraction=0.0, decay_fraction=0.0),
        teaching=teaching,
        validation_every=steps,
        log_every=max(1, steps // 8),
        checkpoint=CheckpointConfig(every=steps),
        **settings,
    )


def _ask(model: Transformer, asked: Mapping[str, TokenDataset]) -> dict[str, Knowledge]:
    return {name: _knowledge(model, dataset.split("validation")) for name, dataset in asked.items()}


def _knowledge(model: Transformer, split: TokenSplit) -> Knowledge:
    loss = measure_perplexity(model, split, context_length=model.config.context_length, batch_size=8).loss
    if split.facts is None:
        return Knowledge(loss=loss)
    found, answers = measure_facts(model, split).all, answer_some(model, split)
    return Knowledge(loss=loss, recall=found.recall, nats_per_fact=found.nats, answers=tuple(answers))


def _remembered(path: Path, measure: Callable[[], dict[str, Knowledge]]) -> dict[str, Knowledge]:
    """Return what was measured before the first step, and measure it where that was not done."""
    if not path.exists():
        write_atomically(path, json.dumps({name: asdict(known) for name, known in measure().items()}, indent=2))
    return _KNOWLEDGE.validate_json(path.read_bytes())


def _spent(run: Path) -> tuple[int, float]:
    """Return the steps of a run and their seconds."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    return last["step"], last["seconds"]
