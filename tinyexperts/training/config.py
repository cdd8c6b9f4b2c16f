"""The configuration of a training run: what a recipe returns, the command line overrides, the run folder keeps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from tinyexperts.errors import InputError, require_at_least
from tinyexperts.layers import PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import TransformerConfig


def path_of(name: str, value: str | os.PathLike[str]) -> Path:
    """Return a caller's argument as a path that can be written to files in UTF-8.

    Args:
        name (str): the argument's name in the error.
        value (str | os.PathLike[str]): the argument.

    Raises:
        InputError: it is no path, or not UTF-8.
    """
    try:
        path = Path(value)
        str(path).encode()
    except TypeError:
        raise InputError(f"{name} must be a path, got {value!r}") from None
    except UnicodeEncodeError:
        raise InputError(f"{name} must be a path in UTF-8, got {os.fsencode(path)!r}") from None
    return path


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizers' settings. Learning rates are those of the peak; betas are Adam's."""

    matrix_learning_rate: float = 4e-3
    """Learning rate of the hidden matrices and the norms' gains."""
    embedding_learning_rate: float = 0.096
    """Learning rate of the token embedding (and of the head where the two are tied)."""
    head_learning_rate: float = 8e-3
    """Learning rate of the output head."""
    table_learning_rate: float = 1e-2
    """Learning rate of the tables of experts."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Betas of all parameters but the tables."""
    table_betas: tuple[float, float] = (0.9, 0.99)
    """Betas of the tables."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the hidden matrices; tables have none."""
    gradient_clip: float | None = 1.0
    """Largest global gradient norm, tables included; None does not clip."""
    table_gradients: Literal["auto", "sparse", "dense"] = "auto"
    """sparse trains the touched rows alone (RowSparseAdam), dense the whole table (AdamW); auto takes sparse on
    CPUs, and elsewhere where a step is expected to touch less than a quarter of the rows."""
    table_second_moment: Literal["element", "row"] = "element"
    """element: a second moment for each number, as in Adam; row: one for each vector, which nearly halves the state of
    the tables. For sparse table gradients."""
    table_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type that tables are kept and trained in. bf16 takes half the memory: a step rounds stochastically, so that no
    small step is lost, and the moments stay fp32. For sparse table gradients, in one process."""

    def __post_init__(self) -> None:
        for name in ("matrix", "embedding", "head", "table"):
            value = getattr(self, f"{name}_learning_rate")
            if not 0 <= value < float("inf"):
                raise InputError(f"optimizer.{name}_learning_rate must be at least 0, got {value}")
        for name in ("betas", "table_betas"):
            if not all(0 <= beta < 1 for beta in getattr(self, name)):
                raise InputError(f"optimizer.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.table_dtype == "bf16" and self.table_gradients == "dense":
            raise InputError("optimizer.table_dtype bf16 needs sparse table gradients, got table_gradients dense")
        if not self.weight_decay >= 0:
            raise InputError(f"optimizer.weight_decay must be at least 0, got {self.weight_decay}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise InputError(
                f"optimizer.gradient_clip must be positive, or None for no clipping, got {self.gradient_clip}"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The course of the learning rates over a run."""

    shape: Literal["cosine", "warmup_stable_decay"] = "warmup_stable_decay"
    """cosine falls to a tenth of the peak; warmup_stable_decay falls linearly to 0 at the end."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rates rise."""
    decay_fraction: float = 0.95
    """Share of the steps in which they fall, for warmup_stable_decay."""

    def __post_init__(self) -> None:
        names, fractions = "schedule.warmup_fraction and decay_fraction", (self.warmup_fraction, self.decay_fraction)
        if min(fractions) < 0 or self.warmup_fraction > 1:
            raise InputError(f"{names} must be between 0 and 1, got {fractions}")
        if self.shape == "warmup_stable_decay" and sum(fractions) > 1 + 1e-9:
            raise InputError(f"{names} must be at most 1 together, got {fractions}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The checkpoints of a run."""

    every: int = 500
    """Steps between two checkpoints; the last step always has one."""
    keep: int = 2
    """Checkpoints to keep."""
    asynchronous: bool = False
    """Write checkpoints while training continues, from a copy of all weights and moments in memory."""

    def __post_init__(self) -> None:
        require_at_least(1, "checkpoint.every", self.every)
        require_at_least(1, "checkpoint.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes that torchrun starts, and how they find each other."""

    mesh: tuple[int, int] | None = None
    """Ranks that torchrun starts, as (replicate, table): table ranks share each table by its columns. Default: one
    group a node, as large as leaves 64 columns to each."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Backend of the exchanges between ranks; auto takes nccl on GPUs and gloo on CPUs."""
    timeout_seconds: float = 600.0
    """Seconds that ranks wait for each other before the run ends and names those that did not answer."""

    def __post_init__(self) -> None:
        if self.mesh is not None and min(self.mesh) < 1:
            raise InputError(f"distributed.mesh must be two numbers of at least 1, got {self.mesh[0]} x {self.mesh[1]}")
        if not 0 < self.timeout_seconds < float("inf"):
            raise InputError(f"distributed.timeout_seconds must be positive, got {self.timeout_seconds}")


# The width of low-rank changes.
DEFAULT_RANK = 8
# What is trained of a model that is taught, and what it remembers by.
Train = Literal["tables", "low-rank", "everything"]
Remember = Literal["nothing", "own-samples", "data"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Old texts that a run that teaches goes over again, so that the model keeps what it knows."""

    data: Path
    """Data set of the texts."""
    teacher: Path | None = None
    """Run whose predictions on them are kept (KL divergence); None trains on the texts themselves."""
    sample_tokens: int | None = None
    """Where the data set is missing, the teacher writes it first: this many tokens."""

    def __post_init__(self) -> None:
        for name in ("data", "teacher"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, path_of(f"teaching.remember.{name}", path))
        require_at_least(1, "teaching.remember.sample_tokens", self.sample_tokens)
        if self.sample_tokens is not None and self.teacher is None:
            raise InputError(
                f"teaching.remember.sample_tokens is for texts that a teacher writes, and there is none: "
                f"{self.sample_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class TeachingConfig:
    """The start of a run that teaches a trained model: what is trained, what is remembered, and when it ends."""

    base: Path
    """Folder of the run whose last weights it begins with."""
    train: Train = "tables"
    """tables trains the experts alone; the router then chooses as before, and query norms keep their statistics.
    low-rank adds to each matrix of attention and of feed-forward layers a product of two narrow ones (LoRA)."""
    rank: int | None = None
    """The width of these, for low-rank; None: 8."""
    rows: int | None = None
    """For tables: rows that a step trains, those that it retrieves most and `old_texts` least (TF-IDF); None: all."""
    old_texts: tuple[Path, ...] = ()
    """Data sets of which the rows are counted, for `rows`."""
    remember: tuple[MemoryConfig, ...] = ()
    """Old texts, of which each step has as many windows as of the new ones, all from one of these."""
    remember_weight: float = 1.0
    """Factor of the loss on them beside that on the new texts."""
    asked: dict[str, Path] = field(default_factory=dict)
    """Data sets of which the held-out part is measured too at each validation, by their names in metrics."""
    patience: int = 2
    """Validations without a better one after which the run ends."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", path_of("teaching.base", self.base))
        if not 0 <= self.remember_weight < float("inf"):
            raise InputError(f"teaching.remember_weight must be at least 0 and finite, got {self.remember_weight}")
        require_at_least(1, "teaching.rank", self.rank)
        require_at_least(1, "teaching.rows", self.rows)
        if self.rank is not None and self.train != "low-rank":
            raise InputError(f"teaching.rank is for low-rank, got {self.rank} with {self.train}")
        if self.rows is not None and self.train != "tables":
            raise InputError(f"teaching.rows are for tables, got {self.rows} with {self.train}")
        if (self.rows is None) == bool(self.old_texts):
            raise InputError(
                f"teaching.rows and old_texts go together, got {self.rows} rows and {len(self.old_texts)} data sets"
            )
        require_at_least(1, "teaching.patience", self.patience)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    run: Path
    """Folder of the run, made by it."""
    data: Path
    """Folder of the data set, made by `tinyexperts data prepare`."""
    model: TransformerConfig
    """The model."""
    num_steps: int | None = None
    """Length of the run in optimizer steps; give this or training_flops."""
    training_flops: float | None = None
    """Length of the run in FLOPs: three forward passes a step, routers and attention included."""
    batch_size: int = 4
    """Sequences of one micro-batch."""
    gradient_accumulation: int = 1
    """Micro-batches of one optimizer step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizers."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The course of the learning rates."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The checkpoints."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""
    teaching: TeachingConfig | None = None
    """For a run that teaches a trained model (`tinyexperts teach` makes one)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes under autocast; auto takes it on GPUs that have it, and fp32 on CPUs, where bf16 is slower."""
    compile: Literal["auto", "on", "off"] = "auto"
    """on joins the small operations of the blocks by torch.compile; auto does so on CPUs, where the run is long enough
    to pay for it (5e12 training FLOPs) and a C++ compiler works. Losses differ by roundings."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    threads: int | None = None
    """CPU threads; default: as torch chooses. Results are bit-equal only for equal numbers of threads."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    validation_every: int = 100
    """Steps between two validations."""
    validation_tokens: int = 32768
    """Tokens of one validation, in windows evenly spread over the held-out split."""

    def __post_init__(self) -> None:
        for name in ("run", "data"):
            object.__setattr__(self, name, path_of(name, getattr(self, name)))
        if (self.num_steps is None) == (self.training_flops is None):
            raise InputError(
                f"give exactly one of num_steps and training_flops, got {self.num_steps} and {self.training_flops} "
                "(--num-steps 100 --training-flops None, for example)"
            )
        for name in (
            *("num_steps", "batch_size", "gradient_accumulation", "threads"),
            *("log_every", "validation_every", "validation_tokens"),
        ):
            require_at_least(1, name, getattr(self, name))
        if self.training_flops is not None and not 0 < self.training_flops < float("inf"):
            raise InputError(f"training_flops must be positive, got {self.training_flops}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be between 0 and 2^63 - 1, got {self.seed}")

    @property
    def tokens_per_step(self) -> int:
        """The number of tokens of one optimizer step."""
        return self.batch_size * self.gradient_accumulation * self.model.context_length


Config = TypeVar("Config", bound=Any)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a configuration with some settings changed.

    Args:
        config (Config): a TrainConfig, or one of its parts.
        settings (Mapping[str, Any]): new values by dotted names, for example "optimizer.weight_decay".
    """
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        part, _, rest = name.partition(".")
        if rest:
            nested.setdefault(part, {})[rest] = value
        else:
            changes[part] = value
    for part, inner in nested.items():
        changes[part] = with_settings(getattr(config, part), inner)
    return replace(config, **changes)


def refuse_quantized_tables(model: TransformerConfig) -> None:
    """Refuse to train a model whose tables are quantized.

    Raises:
        InputError: they are.
    """
    layer = model.expert_layer
    if isinstance(layer, PEERConfig | ProductKeyMemoryConfig) and layer.table_bits is not None:
        raise InputError(f"a quantized table is not trained: model.expert_layer.table_bits is {layer.table_bits}")


def refuse_bf16_tables_of_ranks(config: TrainConfig, num_ranks: int) -> None:
    """Refuse tables in bf16 that several ranks train.

    Raises:
        InputError: they do.
    """
    if config.optimizer.table_dtype == "bf16" and num_ranks > 1:
        raise InputError(f"optimizer.table_dtype bf16 is for one process, got {num_ranks} ranks")
