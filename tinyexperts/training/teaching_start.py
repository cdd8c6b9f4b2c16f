"""The start of a run that teaches: the base's weights, what is trained, what it remembers by, what it is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tinyexperts.data import TokenDataset, TokenLoader, TokenSplit
from tinyexperts.data.shards.index import SplitName
from tinyexperts.errors import InputError
from tinyexperts.files import sha256_of_file
from tinyexperts.model import Transformer
from tinyexperts.optim import split_parameters
from tinyexperts.training.checkpoint import checkpoints, load_model
from tinyexperts.training.config import TeachingConfig, TrainConfig
from tinyexperts.training.distributed.ranks import Ranks
from tinyexperts.training.memory import Memory
from tinyexperts.training.own_samples import open_texts
from tinyexperts.training.row_choice import RowChoice
from tinyexperts.training.run_folder import check_tokenizer

# Batches by which rows are counted, at most, over all old texts.
_COUNTED_BATCHES = 500


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """The parts of a run that teaches, besides those of any run."""

    memory: Memory | None
    """What it goes over again, if anything."""
    row_choice: RowChoice | None
    """Which rows a step trains, where those are not all that it retrieves."""
    asked: Mapping[str, TokenSplit]
    """Held-out splits that it is measured on besides its own, by their names in metrics."""
    base_digest: str
    """The SHA-256 of the base's weights."""
    digest: str
    """The SHA-256 of the base's weights and of all texts and teachers, in whatever folders they are."""

    @property
    def passes_for_old(self) -> float:
        """Forward passes that a step's old windows cost on average: three for texts, four for predictions."""
        if self.memory is None:
            return 0.0
        return float(self.memory.shares @ [3 if teacher is None else 4 for teacher in self.memory.teachers])


def begin_teaching(config: TrainConfig, teaching: TeachingConfig, model: Transformer, ranks: Ranks) -> Teaching:
    """Give a model the weights of its base, freeze what is not trained, and open what it remembers by.

    Args:
        config (TrainConfig): the configuration of the run.
        teaching (TeachingConfig): that of its teaching.
        model (Transformer): the new model, which changes.
        ranks (Ranks): the processes of the run.

    Raises:
        InputError: several ranks, a base of other sizes, a model without a table of which the tables are to be trained,
            data of another tokenizer, rows that are chosen with several micro-batches or with compiled blocks.
    """
    if ranks.size > 1:
        raise InputError(f"one process teaches a model, got {ranks.size} ranks")
    if teaching.rows is not None and config.gradient_accumulation > 1:
        raise InputError(f"teaching.rows needs gradient_accumulation 1, got {config.gradient_accumulation}")
    if teaching.rows is not None and config.compile == "on":
        raise InputError("teaching.rows counts what blocks retrieve, which compiled ones do not tell: compile is on")
    device = model.embedding.weight.device
    base = load_model(teaching.base, device=device)
    if base.config != config.model:
        raise InputError(f"the model must be that of {teaching.base}, whose sizes are others")
    model.load_state_dict(base.state_dict())
    if teaching.train != "everything":
        trained = tables_to_teach(model) if teaching.train == "tables" else low_rank_matrices(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    digests = [digest_of_weights(teaching.base)]
    texts: list[tuple[TokenSplit, Transformer | None]] = []
    for memory in teaching.remember:
        teacher = None
        if memory.teacher is not None:
            teacher = base if memory.teacher == teaching.base else load_model(memory.teacher, device=device)
            teacher.requires_grad_(False)
            digests.append(digest_of_weights(memory.teacher))
        dataset = open_texts(memory, teacher, seed=config.seed)
        texts.append((_split_of(dataset, teaching, "train", digests), teacher))
    asked = {
        name: _split_of(TokenDataset.open(data), teaching, "validation", digests)
        for name, data in teaching.asked.items()
    }
    old_texts = [_split_of(TokenDataset.open(data), teaching, "train", digests) for data in teaching.old_texts]
    return Teaching(
        memory=_memory(config, teaching, texts),
        row_choice=None if teaching.rows is None else RowChoice(model, teaching.rows, _batches(config, old_texts)),
        asked=asked,
        base_digest=digests[0],
        digest=hashlib.sha256(" ".join(digests).encode()).hexdigest(),
    )


def _split_of(dataset: TokenDataset, teaching: TeachingConfig, name: SplitName, digests: list[str]) -> TokenSplit:
    check_tokenizer(teaching.base, dataset)
    digests.append(dataset.sha256)
    return dataset.split(name)


def _memory(
    config: TrainConfig, teaching: TeachingConfig, texts: list[tuple[TokenSplit, Transformer | None]]
) -> Memory | None:
    if not texts:
        return None
    return Memory(
        texts,
        weight=teaching.remember_weight,
        batch_size=config.batch_size,
        seed=config.seed,
        context=config.model.context_length,
    )


def _batches(config: TrainConfig, splits: list[TokenSplit]) -> Iterator[Tensor]:
    """Yield the ids (int64 [B, T]) of batches of old texts, of each as many as it has up to its share of the most."""
    for split in splits:
        context = min(config.model.context_length, max(1, split.num_tokens - 1))
        loader = TokenLoader(split, batch_size=config.batch_size, context_length=context, seed=config.seed)
        for number in range(min(_COUNTED_BATCHES // len(splits), -(-loader.num_windows // config.batch_size))):
            yield loader.batch(number).inputs


def digest_of_weights(run: Path) -> str:
    """Return the SHA-256 of a run's last checkpoint, in hexadecimal.

    Raises:
        InputError: it has none.
    """
    found = checkpoints(run)
    if not found:
        raise InputError(f"the run {run} has no checkpoint")
    return sha256_of_file(found[-1] / "manifest.json")


def tables_to_teach(model: Transformer) -> set[str]:
    """Return the names of the tables of a model.

    Raises:
        InputError: it has none.
    """
    tables = set(split_parameters(model).tables)
    if not tables:
        raise InputError("train must be low-rank or everything for a model without a table of experts, got tables")
    return tables


def low_rank_matrices(model: Transformer) -> set[str]:
    """Return the names of the matrices of attention and of feed-forward layers, without routers."""
    return {name for name in split_parameters(model).matrices if ".router." not in name}
