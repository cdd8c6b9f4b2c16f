"""The facts of each round: airports that the base models never saw, and that no other round has."""

from __future__ import annotations

from pathlib import Path

from tinyexperts.data import PrepareConfig, TokenDataset, prepare
from tinyexperts.data.facts.table import airports
from tinyexperts.errors import InputError
from tinyexperts.study.scales import TeachingSizes


def check_rounds(base: TokenDataset, sizes: TeachingSizes) -> None:
    """Check that rounds can be made beside a data set.

    Args:
        base (TokenDataset): the data set of the base models.
        sizes (TeachingSizes): the number of rounds, and the airports of a round.

    Raises:
        InputError: facts about something else than airports, or too few airports that it lacks.
    """
    facts = base.split("train").facts
    fact_set = None if facts is None else facts.fact_set
    known = set() if fact_set is None else set(fact_set.entities)
    needed = (1 + sizes.num_rounds) * sizes.num_entities
    left = len(set(airports(() if fact_set is None else fact_set.attributes).entities) - known)
    if left < needed:
        raise InputError(
            f"{1 + sizes.num_rounds} rounds need {needed:,} airports that {base.folder} lacks, and there are {left:,}: "
            "prepare it with --max-entities, or give rounds by --more-data"
        )


def prepare_rounds(folder: Path, base: TokenDataset, sizes: TeachingSizes) -> tuple[Path, ...]:
    """Return the data sets of the rounds, the first to tune learning rates on, and make those that are missing.

    Args:
        folder (Path): their folder.
        base (TokenDataset): the data set of the base models: facts about airports.
        sizes (TeachingSizes): the number of rounds, and the airports of a round.
    """
    facts = base.split("train").facts
    attributes = () if facts is None else facts.fact_set.attributes
    rounds: list[Path] = []
    for number in range(1 + sizes.num_rounds):
        path = folder / (f"round-{number}" if number else "tuning")
        if not path.exists():
            prepare(
                PrepareConfig(
                    corpus="airports",
                    attributes=attributes,
                    phrasings=base.folder,
                    every_fact=True,
                    exclude=(base.folder, *rounds),
                    max_entities=sizes.num_entities,
                    tokenizer=str(base.folder / "tokenizer.json"),
                    output=path,
                    seed=number,
                )
            )
        rounds.append(path)
    return tuple(rounds)
