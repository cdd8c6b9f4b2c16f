"""What is taught, and the way to teach: the options of `tinyexperts teach` and of `teach` in Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyexperts.errors import InputError, require_at_least
from tinyexperts.training.config import Remember, Train, path_of


@dataclass(frozen=True, kw_only=True)
class TeachOptions:
    """The way to teach: what is trained, and what is remembered by."""

    train: Train = "tables"
    """tables trains the experts alone; low-rank adds narrow products to the matrices (LoRA); everything trains all
    weights. The last two are for models without a table, too."""
    rank: int | None = None
    """Width of these products, for low-rank; without it 8."""
    rows: int | None = None
    """For tables: rows that a step trains, those that it retrieves most and old texts least (TF-IDF); without it all.
    The old texts are all that is remembered by, or else the data of the run and of those that it comes from."""
    remember: Remember = "own-samples"
    """own-samples keeps the model's predictions on texts that it writes itself before it starts, and on those of
    earlier teachings; data goes over the run's data set again, where that is still there, and over those of earlier
    teachings."""
    remember_weight: float | None = None
    """Factor of the loss on what is remembered, beside that of what is new; without it 1."""
    sample_tokens: int | None = None
    """Tokens of own samples to draw; without it 131072, and a quarter of them beside those of earlier teachings."""
    passes: int = 16
    """Times to go over what is new, at most; it ends before when held-out wordings are learned no better."""
    table_learning_rate: float | None = None
    """Learning rate of the tables; without it 1e-2, and 3e-3 where everything is trained."""
    learning_rate: float | None = None
    """Learning rate of all other weights: without it 1e-3 where everything is trained, and 1e-2 of narrow products."""
    seed: int = 0
    """Seed of the order of what is new, and of own samples."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    threads: int | None = None
    """CPU threads; default: as torch chooses."""

    def __post_init__(self) -> None:
        if self.rows is not None and self.train != "tables":
            raise InputError(f"rows are for train tables, got {self.rows} with {self.train}")
        if self.rank is not None and self.train != "low-rank":
            raise InputError(f"rank is for train low-rank, got {self.rank} with {self.train}")
        if self.learning_rate is not None and self.train == "tables":
            raise InputError(
                f"learning_rate is for what is no table, got {self.learning_rate} with train tables: give "
                "table_learning_rate"
            )
        if self.table_learning_rate is not None and self.train == "low-rank":
            raise InputError(
                f"table_learning_rate is for tables, got {self.table_learning_rate} with train low-rank: give "
                "learning_rate"
            )
        if self.sample_tokens is not None and self.remember != "own-samples":
            raise InputError(f"sample_tokens are for own samples, got {self.sample_tokens} with {self.remember}")
        if self.remember_weight is not None and self.remember == "nothing":
            raise InputError(f"remember_weight is for what is remembered, got {self.remember_weight} with nothing")
        for name in ("passes", "rank", "rows", "sample_tokens", "threads"):
            require_at_least(1, name, getattr(self, name))
        for name in ("table_learning_rate", "learning_rate", "remember_weight"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise InputError(f"{name} must be at least 0 and finite, got {value}")


@dataclass(frozen=True, kw_only=True)
class TeachConfig(TeachOptions):
    """The new facts or texts for the model of a run, and the way to teach them."""

    output: Path
    """Folder of the new run; the same command continues one that was cut off."""
    facts: Path | None = None
    """Table of new facts, a .csv or .tsv with an entity in each row."""
    key: str | None = None
    """Column of the table that names the entities."""
    attributes: tuple[str, ...] = ()
    """Columns of the table that are facts; without it all but the key."""
    phrasings: Path | None = None
    """TOML file with phrasings, or a data set of facts, as for `data prepare`; without it those in which the run, or
    one that it comes from, was taught these attributes."""
    files: tuple[Path, ...] = ()
    """Files and folders of new texts, in place of facts."""
    data: Path | None = None
    """Data set of what is new, in place of both, made with the run's tokenizer, and of facts with --every-fact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "output", path_of("output", self.output))
        given = {"facts": self.facts, "files": self.files, "data": self.data}
        named = [name for name, value in given.items() if value]
        if len(named) != 1:
            raise InputError(f"give one of facts, files and data, got {' and '.join(named) or 'none'}")
        for name in ("key", "attributes", "phrasings"):
            if self.facts is None and (value := getattr(self, name)):
                raise InputError(f"{name} is for a table of facts, and none was given: {value}")

    @property
    def folder(self) -> Path:
        """The part of the run's folder that is made before its first step."""
        return self.output / "teaching"
